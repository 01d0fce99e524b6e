"""New data under a daemon as it runs in production: PostgreSQL, what runs print in S3, the store in S3."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import dagster as dg
import pytest
from integration.cli import materialize_command, run_at_once
from integration.daemon import Daemon, processes_of, running
from integration.test_daemon import JOB, QUICK, WORKERS, drop, inbox, rows
from integration.test_hub_store import commit, downloads, environment
from paths import ROOT
from processes import kill
from projects import TestProject
from servers import postgres as postgres_server
from servers import proxy as proxy_server
from servers.hub import Hub
from servers.postgres import Postgres
from servers.proxy import Fault
from servers.s3 import Bucket

__all__ = ["commit", "inbox", "rows"]
pytestmark = pytest.mark.system
LONGER = QUICK.replace("batch_size: 2", "batch_size: 8")
SOAK = bool(os.environ.get("SOAK"))
STEPS, NAMES = (40, ["one", "two"]) if SOAK else (8, ["one"])
LONGER = LONGER.replace("max_steps: 2", f"max_steps: {STEPS}, save_steps: 4, logging_steps: 4")


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if missing := postgres_server.missing():
        pytest.skip(f"{missing} is not installed (Debian: postgresql)")
    with postgres_server.running() as server:
        yield server


@pytest.fixture
def production(project: TestProject, postgres: Postgres, ceph: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The project with deploy/dagster.yaml."""
    (project.root / "dagster_home" / "dagster.yaml").write_text((ROOT / "deploy" / "dagster.yaml").read_text())
    for name, value in {**postgres.environment, "FINETUNE_LOGS_BUCKET": ceph.name, "FINETUNE_STORE": ceph.url}.items():
        monkeypatch.setenv(name, value)
    for pool in ("gpu", "hub"):
        limit_pool(pool, 1)
    return ceph


def limit_pool(pool: str, limit: int) -> None:
    """Do what docs/deployment.md says."""
    command = [sys.executable, "-m", "dagster", "instance", "concurrency", "set", pool, str(limit)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.soak
@pytest.mark.parametrize("limit", [1, 3])
def test_pool_keeps_runs_from_downloading_the_same_model(
    commit: str, hub: Hub, production: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    limit_pool("hub", limit)
    with proxy_server.running(hub.url) as slow:
        slow.faults.append(Fault(r"/resolve/.*model\.safetensors", "throttle", None, rate=500_000))
        monkeypatch.setenv("HF_ENDPOINT", slow.url)
        run_at_once(materialize_command("cached_base_model"), [environment(tmp_path / f"node{i}") for i in range(3)])
    assert downloads(hub) == limit


@pytest.mark.minutes
@pytest.mark.real_data
def test_runs_outlive_their_daemon(project: TestProject, production: Bucket, inbox: Path, rows: list[str]) -> None:
    for number, name in enumerate(NAMES):
        project.write_experiment(name, LONGER + f"lora: {{rank: {number + 2}}}\n")
    drop(inbox, "a.jsonl", rows[:100])
    with running(project, own_servers=True) as daemon:
        daemon.wait_for("all runs at once", lambda: len(unfinished(daemon)) == len(NAMES))
        daemon.wait_for("a training", lambda: processes_of(project, JOB))
        daemon.kill()
        with running(project, own_servers=True) if SOAK else nullcontext():  # another starts nothing a second time
            daemon.wait_for("evaluations", lambda: len(daemon.made("adapter_evaluation")) == len(NAMES), 600)
            daemon.wait_for("no run", daemon.quiet)
        assert sorted(record.partition_key or "" for record in daemon.made("lora_adapter")) == NAMES
        assert {record.dagster_run.status for record in daemon.runs()} == {dg.DagsterRunStatus.SUCCESS}
        assert not gone_on(daemon)
    assert adapters(production) == len(NAMES)
    assert any(key.startswith("dagster-logs/") for key in production.listed())


@pytest.mark.soak
@pytest.mark.real_data
def test_a_machine_that_dies_loses_nothing(
    project: TestProject, production: Bucket, inbox: Path, rows: list[str]
) -> None:
    """Daemon, code server, runs and trainings at once."""
    for number, name in enumerate(("one", "two")):
        project.write_experiment(name, LONGER + f"lora: {{rank: {number + 2}}}\n")
    drop(inbox, "a.jsonl", rows[:100])
    with running(project, own_servers=True) as daemon:
        daemon.wait_for("a checkpoint", lambda: checkpoints(production))
        daemon.kill()
        kill(processes_of(project, *WORKERS, "dagster"))
    with running(project, own_servers=True) as daemon:
        daemon.wait_for("two evaluations", lambda: len(daemon.made("adapter_evaluation")) == 2, 600)
        daemon.wait_for("no run", daemon.quiet)
        assert sorted(record.partition_key or "" for record in daemon.made("lora_adapter")) == ["one", "two"]
        assert gone_on(daemon)
    assert adapters(production) == 2
    assert not checkpoints(production)


def adapters(bucket: Bucket) -> int:
    """How many there are."""
    return len([key for key in bucket.listed() if "/adapters/" in key and key.endswith("manifest.json")])


def checkpoints(bucket: Bucket) -> list[str]:
    """Whole ones."""
    return [key for key in bucket.listed() if "/checkpoints/" in key and key.endswith("manifest.json")]


def gone_on(daemon: Daemon) -> list[str]:
    """What runs told of trainings that went on from a checkpoint."""
    with daemon.instance as instance:
        told = [entry.user_message for run in instance.get_runs() for entry in instance.all_logs(run.run_id)]
    return [line for line in told if re.search(r"checkpoint.*\bstep \d+", line)]


def unfinished(daemon: Daemon) -> list[object]:
    return [record for record in daemon.runs() if not record.dagster_run.is_finished]
