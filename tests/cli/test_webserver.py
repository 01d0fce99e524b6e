"""Dagster's real webserver behind the guard: no request of another site starts a run, and its own pages' do."""

import http.client
import json
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest
import websockets.sync.client as websockets
from click.testing import CliRunner
from integration.webserver import LAUNCH, Webserver, serving
from websockets.exceptions import InvalidStatus

from finetune_assets.cli import webserver as command
from finetune_assets.cli.main import finetune
from finetune_assets.cli.ui import ui

FORM, TEXT, JSON = "application/x-www-form-urlencoded", "text/plain", "application/json"
BY_ADDRESS = "/graphql?" + urlencode({"query": LAUNCH})
BODY = json.dumps({"query": LAUNCH})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webserver]:
    with serving(tmp_path_factory.mktemp("webserver"), "--allow-host", "dagster.example.org") as running:
        yield running


def send(server: Webserver, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


def test_no_request_of_another_site_starts_a_run(server: Webserver) -> None:
    before, port, evil = server.runs(), server.port, "http://evil.example"
    answers = {
        "picture": send(server, "GET", BY_ADDRESS, accept="image/webp,*/*"),
        "link": send(server, "GET", BY_ADDRESS, accept="text/html", sec_fetch_site="cross-site"),
        "form": send(server, "POST", BY_ADDRESS, origin=evil, content_type=FORM),
        "form without origin": send(server, "POST", BY_ADDRESS, content_type=FORM),
        "form of text": send(server, "POST", BY_ADDRESS, BODY, origin="null", content_type=TEXT),
        "fetch": send(server, "POST", "/graphql", BODY, origin=evil, content_type=JSON),
        "fetch from another port": send(
            server, "POST", "/graphql", BODY, origin=f"http://127.0.0.1:{port + 1}", content_type=JSON
        ),
        "preflight": send(server, "OPTIONS", "/graphql", origin=evil, access_control_request_method="POST"),
        "rebound": send(
            server, "POST", "/graphql", BODY, host=f"evil.example:{port}", origin=f"{evil}:{port}", content_type=JSON
        ),
        "rebound without origin": send(
            server, "POST", "/graphql", BODY, host=f"evil.example:{port}", content_type=JSON
        ),
        "report": send(server, "POST", "/report_asset_materialization/victim", origin=evil, content_type=FORM),
    }
    assert all(400 <= status < 500 for status, _ in answers.values()), answers
    assert (server.runs(), server.reported()) == (before, 0)
    assert "--allow-host" in answers["rebound"][1]


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:{port}", "http://127.0.0.1:{port}"),
        ("localhost:{port}", "http://localhost:{port}"),
        ("dagster.example.org", "https://dagster.example.org"),
        ("127.0.0.1:{port}", "https://dagster.example.org"),
        ("127.0.0.1:{port}", None),
    ],
    ids=["address", "name", "proxy that keeps Host", "proxy that replaces Host", "program"],
)
def test_own_requests_start_a_run(server: Webserver, host: str, origin: str | None) -> None:
    before = server.runs()
    headers = {"host": host, **({"origin": origin, "sec_fetch_site": "same-origin"} if origin else {})}
    named = {name: value.format(port=server.port) for name, value in headers.items()}
    status, answer = send(server, "POST", "/graphql", BODY, content_type=JSON, **named)
    assert status == 200
    assert json.loads(answer)["data"]["launchRun"]["__typename"] == "LaunchRunSuccess"
    assert server.runs() == before + 1


def test_pages_files_and_reports_work(server: Webserver) -> None:
    status, page = send(server, "GET", "/asset-groups", accept="text/html")
    assert status == 200
    assert "<html" in page
    assert send(server, "GET", "/server_info")[0] == 200
    assert send(server, "GET", "/graphql", accept="text/html")[0] == 200
    status, answer = send(server, "GET", "/logs/gone/compute_logs/x.err")
    assert (status, "No log files" in answer) == (404, True), "Dagster's own answer"
    before = server.reported()
    assert send(server, "POST", "/report_asset_materialization/victim", "{}", content_type=JSON)[0] == 200
    assert server.reported() == before + 1


def test_websocket_is_the_pages_own(server: Webserver) -> None:
    address = f"ws://127.0.0.1:{server.port}/graphql"
    for origin in ("http://evil.example", f"http://127.0.0.1:{server.port + 1}"):
        with pytest.raises(InvalidStatus) as refused, websockets.connect(address, origin=origin):  # type: ignore[arg-type]
            pass
        assert refused.value.response.status_code == 403
        assert b"another site" in (refused.value.response.body or b"")
    own = websockets.connect(address, origin=server.address, subprotocols=["graphql-ws"])  # type: ignore[arg-type,list-item]
    with own as connection:
        connection.send(json.dumps({"type": "connection_init"}))
        assert json.loads(connection.recv(60)) == {"type": "connection_ack"}


@pytest.mark.parametrize(
    ("host", "warned"),
    [
        ("127.0.0.1", False),
        ("localhost", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("192.168.1.5", True),
        ("::", True),
    ],
)
def test_host_that_others_reach_is_warned_of(monkeypatch: pytest.MonkeyPatch, host: str, warned: bool) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(command.dagster_webserver, "main", lambda arguments, **_: started.append(arguments))
    monkeypatch.setattr(command, "guard_webserver", lambda _: None)
    done = CliRunner().invoke(command.webserver, ["-h", host, "-w", "workspace.yaml", "-p", "3000"])
    assert done.exit_code == 0
    assert started == [["--host", host, "-w", "workspace.yaml", "-p", "3000"]]
    assert ("no login" in done.stderr and host in done.stderr) == warned


def test_name_that_is_none_is_refused_before_anything_starts() -> None:
    done = CliRunner().invoke(finetune, ["ui", "--allow-host", "https://dagster.example.org/"])
    assert done.exit_code == 2
    assert "https://dagster.example.org/" in done.stderr


def test_ui_passes_its_names_on(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr("finetune_assets.cli.ui.serve", lambda page, daemon: commands.append(page) or 0)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setenv("FINETUNE_UI_HOSTS", "one.example.org two.example.org:8443")
    done = CliRunner().invoke(ui, ["--host", "127.0.0.2", "--port", "3001"])
    assert done.exit_code == 0
    (page,) = commands
    assert page[1:3] == ["-m", "finetune_assets.cli.webserver"]
    assert {"--allow-host=one.example.org", "--allow-host=two.example.org:8443"} <= {*page}
    assert page[page.index("--host") + 1] == "127.0.0.2"
