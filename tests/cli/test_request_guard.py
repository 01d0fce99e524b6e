"""Which requests reach Dagster's webserver: its own pages' and programs', and no other site's."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket

from finetune_assets.cli.request_guard import Names, RequestGuard, parse_names, refusal

HOST = "localhost:3000"
OWN = "http://localhost:3000"
JSON = {"content_type": "application/json"}
SERVER = Names("192.168.1.5", parse_names(["dagster.example.org", "other.example.org:8443"]))


def status(method: str, path: str, server: Names = SERVER, kind: str = "http", **headers: str) -> int:
    """Status of the refusal of a request; 0 if it is passed on."""
    sent = {"host": HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = [(name.encode(), value.encode()) for name, value in sent.items()]
    scope = {"type": kind, "method": method, "path": path, "query_string": b"query=mutation", "headers": raw}
    refused = refusal(HTTPConnection(scope), server)
    return refused.status if refused else 0


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(
            (name, 0)
            for name in ("localhost", "LOCALHOST:3000", "localhost.", "127.0.0.1:3000", "127.1.2.3", "[::1]:3000")
        ),
        *((name, 0) for name in ("192.168.1.5:3000", "dagster.example.org", "DAGSTER.example.org:80")),
        *(
            (name, 403)
            for name in ("evil.example:3000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1")
        ),
        *((name, 403) for name in ("evil-dagster.example.org", "a.dagster.example.org", "0.0.0.0:3000", "[::2]:3000")),
        *(
            (name, 400)
            for name in ("", "localhost:x", "localhost:1:2", "me@localhost", "localhost/x", "local host", "[::1")
        ),
    ],
)
def test_host(host: str, expected: int) -> None:
    assert status("GET", "/", host=host) == expected
    assert status("POST", "/graphql", host=host, **JSON) == expected
    assert status("GET", "/graphql", kind="websocket", host=host) == expected


def test_host_is_sent_once() -> None:
    for raw in ([], [(b"host", b"localhost"), (b"host", b"evil.example")]):
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": raw}
        refused = refusal(HTTPConnection(scope), SERVER)
        assert refused
        assert refused.status == 400


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        (HOST, OWN, 0),
        ("localhost", "http://localhost", 0),
        ("localhost", "https://localhost", 0),
        ("[::1]:3000", "http://[::1]:3000", 0),
        ("dagster.example.org", "https://dagster.example.org", 0),
        ("127.0.0.1:3000", "https://dagster.example.org", 0),  # a proxy that replaces Host
        ("127.0.0.1:3000", "https://other.example.org:8443", 0),
        ("127.0.0.1:3000", "https://other.example.org", 403),
        ("127.0.0.1:3000", "https://dagster.example.org:8443", 403),
        ("dagster.example.org:3000", "http://dagster.example.org", 403),  # another server of the same machine
        ("192.168.1.5:3000", "http://192.168.1.5", 403),
        ("127.0.0.1:3000", "http://192.168.1.5:3000", 403),
        (HOST, "http://localhost:8000", 403),
        (HOST, "http://127.0.0.1:3000", 403),
        (HOST, "http://localhost", 403),
        (HOST, "https://evil.example", 403),
        (HOST, "http://localhost:3000.evil.example", 403),
        (HOST, "http://evil.example@localhost:3000", 403),
        (HOST, "null", 403),
        (HOST, "", 403),
        (HOST, "file://", 403),
        (HOST, "chrome-extension://localhost:3000", 403),
    ],
)
def test_origin(host: str, origin: str, expected: int) -> None:
    assert status("POST", "/graphql", host=host, origin=origin, **JSON) == expected
    assert status("POST", "/report_asset_materialization/a", host=host, origin=origin) == expected
    assert status("OPTIONS", "/graphql", host=host, origin=origin) == expected
    assert status("GET", "/graphql", kind="websocket", host=host, origin=origin) == expected
    assert status("GET", "/logs/x.err", host=host, origin=origin) == expected


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_site(site: str) -> None:
    assert status("POST", "/graphql", sec_fetch_site=site, **JSON) == 403
    assert status("GET", "/graphql", kind="websocket", sec_fetch_site=site) == 403
    assert status("GET", "/logs/x.err", sec_fetch_site=site, sec_fetch_mode="no-cors", sec_fetch_dest="image") == 403
    assert status("GET", "/", sec_fetch_site=site, sec_fetch_mode="navigate", sec_fetch_dest="iframe") == 403
    assert status("POST", "/", sec_fetch_site=site, sec_fetch_mode="navigate", sec_fetch_dest="document") == 403
    link = {"sec_fetch_site": site, "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert status("GET", "/graphql", accept="text/html", **link) == 403
    assert status("GET", "/runs/abc", **link) == 0, "a link in a chat leads to a run"


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_own_site(site: str) -> None:
    assert status("POST", "/graphql", origin=OWN, sec_fetch_site=site, **JSON) == 0
    assert status("GET", "/logs/x.err", sec_fetch_site=site) == 0
    assert status("GET", "/graphql", kind="websocket", origin=OWN, sec_fetch_site=site) == 0


@pytest.mark.parametrize("path", ["/graphql", "/graphql/", "/prefix/graphql"])
@pytest.mark.parametrize(
    ("method", "headers", "expected"),
    [
        ("GET", {}, 405),
        ("GET", {"accept": "*/*"}, 405),
        ("GET", {"accept": "image/avif,image/webp"}, 405),
        ("GET", {"accept": "text/html,*/*"}, 0),  # Dagster answers with its query editor
        ("POST", {}, 415),
        ("POST", {"content_type": "text/plain"}, 415),
        ("POST", {"content_type": "text/plain; application/json"}, 415),
        ("POST", {"content_type": "application/x-www-form-urlencoded"}, 415),
        ("POST", {"content_type": "multipart/form-data; boundary=x"}, 415),
        ("POST", {"content_type": "Application/JSON; charset=utf-8"}, 0),
        ("POST", {"content_type": "application/graphql"}, 0),
    ],
)
def test_graphql(path: str, method: str, headers: dict[str, str], expected: int) -> None:
    assert status(method, path, **headers) == expected


@pytest.mark.parametrize("text", ["https://dagster.example.org", "a/b", "", "a:b", "me@host", "a b", "a:1:x"])
def test_name_that_is_none_is_refused_with_the_name(text: str) -> None:
    with pytest.raises(ValueError, match="host name") as error:
        parse_names(["fine", text])
    assert repr(text) in str(error.value)


@pytest.fixture
def client() -> Callable[..., TestClient]:
    """A client of an application behind the guard, under an address."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            websocket = WebSocket(scope, receive, send)
            await websocket.accept()
            await websocket.send_text("hello")
            await websocket.close()
        elif scope["type"] == "http":
            await PlainTextResponse("hello")(scope, receive, send)

    return lambda address=OWN: TestClient(RequestGuard(app, SERVER), base_url=address)


def test_answers(client: Callable[..., TestClient]) -> None:
    passed = client().get("/")
    assert (passed.status_code, passed.text) == (200, "hello")
    assert passed.headers["x-frame-options"] == "SAMEORIGIN"
    refused = client("http://evil.example:3000").get("/")
    assert refused.status_code == 403
    assert all(fact in refused.text for fact in ("'evil.example'", "--allow-host", "FINETUNE_UI_HOSTS"))
    assert refused.headers["content-type"].startswith("text/plain")
    long = client().get("/", headers={"origin": "http://" + "x" * 5000})
    assert long.status_code == 403
    assert len(long.text) < 1000


def test_websockets(client: Callable[..., TestClient]) -> None:
    own, rebound = "ws://localhost:3000/graphql", "ws://evil.example:3000/graphql"
    with client().websocket_connect(own, headers={"origin": OWN}) as websocket:
        assert websocket.receive_text() == "hello"
    for address, origin in ((own, "http://evil.example"), (own, "null"), (rebound, "http://evil.example:3000")):
        with (
            pytest.raises(WebSocketDenialResponse) as denied,
            client().websocket_connect(address, headers={"origin": origin}),
        ):
            pass
        assert denied.value.status_code == 403


def test_websocket_of_a_server_that_can_send_no_text_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/graphql", "query_string": b"", "headers": [(b"host", b"evil.example")]}
    asyncio.run(RequestGuard(PlainTextResponse("hello"), SERVER)(scope, send, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]
