"""Alerts reach a real web server and a real mail server, and hold no secret."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import dagster as dg
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Message as MessageHandler
from projects import TestProject

from finetune_assets.automation import alert_sensors, alerts, heartbeat
from finetune_assets.automation.alerts import AlertError, send_alert

SECRET = "T000-planted-hook-secret"


class Inbox(MessageHandler):
    def __init__(self) -> None:
        super().__init__()
        self.mails: list[Message] = []

    def handle_message(self, message: Message) -> None:
        self.mails.append(message)


@pytest.fixture
def inbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Message]]:
    """What a mail server receives, to which the environment points."""
    handler = Inbox()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Controller(handler, hostname="127.0.0.1", port=port)
    server.start()
    monkeypatch.setenv("FINETUNE_SMTP", f"smtp://127.0.0.1:{port}")
    monkeypatch.setenv("FINETUNE_ALERT_EMAIL", "on-call@example.org,team@example.org")
    yield handler.mails
    server.stop()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What a webhook receives, to which the environment points."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == f"/{SECRET}"
            assert self.headers["Content-Type"] == "application/json"
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("FINETUNE_ALERT_WEBHOOK", f"http://127.0.0.1:{server.server_port}/{SECRET}")
    yield received
    server.shutdown()


def test_nothing_is_configured_and_nothing_is_sent() -> None:
    assert not alerts.configured()
    send_alert("title", "text")


def test_both_ways(hook: list[dict[str, Any]], inbox: list[Message]) -> None:
    send_alert("failed: lora_adapter for demo", "out of memory\nsecond line")
    assert hook == [{"text": "*failed: lora_adapter for demo*\nout of memory\nsecond line"}]
    (mail,) = inbox
    assert mail["Subject"] == "failed: lora_adapter for demo"
    assert mail["To"] == "on-call@example.org,team@example.org"
    assert "out of memory" in str(mail.get_payload())


def test_one_way_that_fails_does_not_hold_up_the_other(inbox: list[Message], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_ALERT_WEBHOOK", f"http://127.0.0.1:9/{SECRET}")
    with pytest.raises(AlertError) as error:
        send_alert("title", "text")
    assert "FINETUNE_ALERT_WEBHOOK: ConnectionRefusedError" in str(error.value)
    assert SECRET not in str(error.value)
    assert len(inbox) == 1


def test_mail_without_a_server_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_ALERT_EMAIL", "me@example.org")
    monkeypatch.setenv("FINETUNE_SMTP", "mail.example.org")
    with pytest.raises(AlertError, match="FINETUNE_ALERT_EMAIL"):
        send_alert("title", "text")


def test_failed_run_is_told_with_its_own_error(hook: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_UI_URL", "http://dagster.example.org/")
    instance = dg.DagsterInstance.ephemeral()

    @dg.asset(name="lora_adapter", partitions_def=dg.StaticPartitionsDefinition(["demo"]))
    def fails() -> None:
        raise dg.Failure("rank 1: no such target module 'q_prj'", allow_retries=False)

    job = dg.Definitions(assets=[fails]).resolve_implicit_global_asset_job_def()
    done = job.execute_in_process(
        asset_selection=[fails.key], partition_key="demo", instance=instance, raise_on_error=False
    )
    failure = done.get_run_failure_event()
    context = dg.build_run_status_sensor_context(
        "alert_on_failure", failure, instance, dagster_run=done.dagster_run
    ).for_run_failure()
    alert_sensors.alert_on_failure(context)
    (told,) = hook
    title = told["text"].splitlines()[0]
    assert "lora_adapter" in title
    assert "demo" in title
    assert "no such target module 'q_prj'" in told["text"]
    assert f"http://dagster.example.org/runs/{done.run_id}" in told["text"]
    assert "Traceback" not in told["text"]


@pytest.mark.parametrize("repeated", [True, False])
def test_killed_run_is_told_and_whether_it_is_started_again(hook: list[dict[str, Any]], repeated: bool) -> None:
    instance = dg.DagsterInstance.ephemeral()

    @dg.asset(name="dolly_raw")
    def reads() -> None: ...

    job = dg.define_asset_job("__anonymous_asset_job_of_a_sensor").resolve(
        asset_graph=dg.Definitions(assets=[reads]).resolve_asset_graph()
    )
    run = instance.create_run_for_job(job, tags={"dagster/will_retry": str(repeated).lower()})
    event = instance.report_run_failed(run)
    context = dg.build_run_status_sensor_context(
        "alert_on_failure", event, instance, dagster_run=instance.get_run_by_id(run.run_id)
    ).for_run_failure()
    alert_sensors.alert_on_failure(context)
    (told,) = hook
    title, cause, *more = told["text"].splitlines()
    assert "dolly_raw" in title
    assert "process" in cause
    assert len(more) == repeated


def test_failed_check_is_told_with_what_it_found(hook: list[dict[str, Any]]) -> None:
    instance = dg.DagsterInstance.ephemeral()

    @dg.asset(name="dolly_raw", check_specs=[dg.AssetCheckSpec("quarantine", asset="dolly_raw", blocking=True)])
    def bad() -> dg.MaterializeResult:  # type: ignore[type-arg]
        told = "20 of 100 rows are bad"
        return dg.MaterializeResult(
            check_results=[dg.AssetCheckResult(passed=False, check_name="quarantine", description=told)]
        )

    done = dg.materialize([bad], instance=instance, raise_on_error=False)
    assert not done.success
    context = dg.build_run_status_sensor_context(
        "alert_on_failure", done.get_run_failure_event(), instance, dagster_run=done.dagster_run
    ).for_run_failure()
    alert_sensors.alert_on_failure(context)
    assert "quarantine" in hook[0]["text"]
    assert "20 of 100 rows are bad" in hook[0]["text"]


def test_standstill_is_told_once(
    project: TestProject, hook: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = project.configs / "raw_data.yaml"
    raw.write_text(raw.read_text() + "\narrivals: {gpu_hours_a_day: 0}\n")
    heartbeat.beat("raw_data_sensor")
    instance, cursor = dg.DagsterInstance.ephemeral(), None

    def tick() -> None:
        nonlocal cursor
        context = dg.build_sensor_context(instance=instance, cursor=cursor)
        cursor = alert_sensors.alert_on_standstill(context).cursor  # type: ignore[union-attr]

    tick()
    tick()
    assert ["arrivals.gpu_hours_a_day" in told["text"] for told in hook] == [True]
    now = time.time()
    monkeypatch.setattr(alert_sensors.time, "time", lambda: now + 400)
    tick()
    tick()
    assert len(hook) == 2
    assert "raw_data_sensor" in hook[1]["text"]
    monkeypatch.setattr(alert_sensors.time, "time", lambda: now)
    tick()
    monkeypatch.setattr(alert_sensors.time, "time", lambda: now + 800)
    tick()
    assert len(hook) == 3, "a sensor that stops once more is told once more"
