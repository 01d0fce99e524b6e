"""A page of another site in a real browser, and Dagster's real webserver: it starts no run, and the UI's own does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlencode

import pytest
from integration.webserver import GUARDED, LAUNCH, Webserver, free_port, serving
from playwright.sync_api import Browser, Error, Page, sync_playwright
from tiers import SOAK

from docs.screenshots import BROWSER

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="chromium is not installed (Debian: chromium)"),
    pytest.mark.system,
]
FOREIGN = "evil.example"
"""A name that leads the browser to 127.0.0.1, as a name server of its owner may tell."""
PAUSE_MILLISECONDS = 500
TAG = "const x = document.createElement"
ATTACKS = {
    "picture": "new Image().src = target",
    "script": f"{TAG}('script'); x.src = target; document.body.append(x)",
    "style": f"{TAG}('link'); x.rel = 'stylesheet'; x.href = target; document.head.append(x)",
    "prefetch": f"{TAG}('link'); x.rel = 'prefetch'; x.href = target; document.head.append(x)",
    "frame": f"{TAG}('iframe'); x.src = target; document.body.append(x)",
    "window": "window.open(target)",
    "form": "form('application/x-www-form-urlencoded')",
    "form of text": "form('text/plain')",
    "form of files": "form('multipart/form-data')",
    "form of JSON as text": "form('text/plain', true)",
    "form without referrer": f"{TAG}('meta'); x.name = 'referrer'; x.content = 'no-referrer'; document.head.append(x);"
    "form('text/plain')",
    "fetch": "fetch(target, {mode: 'no-cors'})",
    "fetch by POST": "fetch(target, {mode: 'no-cors', method: 'POST'})",
    "fetch of text": "fetch(ui + '/graphql', {mode: 'no-cors', method: 'POST', body: launch})",
    "fetch with CORS": "fetch(target)",
    "fetch of JSON with CORS": "fetch(ui + '/graphql', "
    "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: launch})",
    "beacon": "navigator.sendBeacon(target)",
    "beacon of JSON": "navigator.sendBeacon(ui + '/graphql', new Blob([launch], {type: 'application/json'}))",
    "report": "fetch(ui + '/report_asset_materialization/victim', {mode: 'no-cors', method: 'POST'})",
}
"""What a page does, by JavaScript, to a UI at the address `ui`."""
HELPERS = """
const target = ui + '/graphql?' + query;
function form(type, json) {
  const f = document.createElement('form');
  const frame = document.createElement('iframe');
  frame.name = 'target'; document.body.append(frame);
  f.method = 'POST'; f.enctype = type; f.target = 'target';
  f.action = json ? ui + '/graphql' : target;
  if (json) {
    const field = document.createElement('input');
    field.name = launch.slice(0, -1) + ', "x": "'; field.value = '"}'; f.append(field);
  }
  document.body.append(f); f.submit();
}
"""
SOCKET = """async (address) => await new Promise(done => {
  const socket = new WebSocket(address.replace('http', 'ws') + '/graphql', 'graphql-ws');
  socket.onerror = () => done('refused');
  socket.onopen = () => socket.send(JSON.stringify({type: 'connection_init'}));
  socket.onmessage = message => done(JSON.parse(message.data).type);
})"""
SEND = """async ([address, body]) => {
  const answer = await fetch(address + '/graphql', {
    method: 'POST', headers: {'Content-Type': 'application/json'}, body});
  return [answer.status, await answer.text()];
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webserver]:
    with serving(tmp_path_factory.mktemp("webserver"), module=GUARDED) as running:
        yield running


@pytest.fixture(scope="module")
def foreign() -> Iterator[int]:
    """The port of a web server with an empty page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>harmless</title><body></body>")

        def log_message(self, *_: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web.server_port
    web.shutdown()
    web.server_close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        rules = f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", rules])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    context = chromium.new_context()
    yield context.new_page()
    context.close()


@pytest.mark.parametrize(
    ("page_name", "ui_name"), [(FOREIGN, "127.0.0.1"), pytest.param("127.0.0.1", "127.0.0.1", marks=SOAK)]
)
def test_page_of_another_site_starts_no_run(
    server: Webserver, foreign: int, page: Page, page_name: str, ui_name: str
) -> None:
    """Most of the attacks reach the webserver; the browser itself refuses the others."""
    before, ui = (server.runs(), server.reported()), f"http://{ui_name}:{server.port}"
    values = {"ui": ui, "query": urlencode({"query": LAUNCH}), "launch": json.dumps({"query": LAUNCH})}
    constants = "".join(f"const {key} = {json.dumps(value)};" for key, value in values.items())
    answered: dict[str, set[int]] = {name: set() for name in ATTACKS}
    tried: list[str] = []
    page.context.on(
        "response", lambda answer: answered[tried[-1]].add(answer.status) if str(server.port) in answer.url else None
    )
    for name, attack in ATTACKS.items():
        tried.append(name)
        page.goto(f"http://{page_name}:{foreign}/")
        page.evaluate(f"() => {{ {constants} {HELPERS} {attack}; }}")
        page.wait_for_timeout(PAUSE_MILLISECONDS)
    page.wait_for_timeout(4 * PAUSE_MILLISECONDS)
    assert (server.runs(), server.reported()) == before
    assert not [name for name, statuses in answered.items() if any(status < 400 for status in statuses)], answered
    assert len([name for name, statuses in answered.items() if statuses]) > len(ATTACKS) / 2, answered
    page.goto(f"http://{page_name}:{foreign}/")
    assert page.evaluate(SOCKET, ui) == "refused"


def test_page_whose_name_leads_to_the_ui_starts_no_run(server: Webserver, page: Page) -> None:
    """DNS rebinding: for the browser, the page and the UI are the same site."""
    before, rebound = server.runs(), f"http://{FOREIGN}:{server.port}"
    answer = page.goto(rebound)
    assert answer
    assert answer.status == 403
    assert f"'{FOREIGN}'" in answer.text()
    status, _ = page.evaluate(SEND, [rebound, json.dumps({"query": LAUNCH})])
    assert status == 403
    assert page.evaluate(SOCKET, rebound) == "refused"
    assert server.runs() == before


def test_ui_cannot_be_framed_and_a_link_leads_to_it(server: Webserver, foreign: int, page: Page) -> None:
    page.goto(f"http://{FOREIGN}:{foreign}/")
    with page.expect_response(lambda answer: str(server.port) in answer.url) as framed:
        page.evaluate(f"() => {{ const x = document.createElement('iframe'); x.src = '{server.address}/'; "
                      "document.body.append(x) }")  # fmt: skip
    assert framed.value.status == 403
    page.evaluate(f"() => {{ document.body.innerHTML = '<a href=\"{server.address}/runs\">run</a>' }}")
    page.click("a")
    page.wait_for_url(f"{server.address}/runs*")
    page.get_by_text("Runs").first.wait_for()


def test_own_page_starts_a_run(server: Webserver, page: Page) -> None:
    before = server.runs()
    failed: list[str] = []
    page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
    page.goto(f"{server.address}/asset-groups")
    page.get_by_text("victim").first.wait_for()
    assert page.evaluate(SOCKET, server.address) == "connection_ack"
    page.get_by_role("button", name="victim").first.click()
    page.get_by_role("button", name="Materialize selected").click()
    page.get_by_text("Launched run").first.wait_for()
    assert server.runs() == before + 1
    status, _ = page.evaluate(SEND, [server.address, json.dumps({"query": LAUNCH})])
    assert status == 200
    assert server.runs() == before + 2
    assert failed == []


def test_browser_is_real(page: Page, server: Webserver) -> None:
    """The name that leads to loopback exists for this browser alone."""
    with pytest.raises(Error):
        page.goto(f"http://nowhere.{FOREIGN}:{server.port}")
