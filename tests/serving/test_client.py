"""The client of vLLM is bounded, and shows no secret."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune_assets.serving import vllm as client
from finetune_assets.serving.errors import ERROR, TIMEOUT, TOKEN, ServerError
from finetune_assets.serving.vllm import VllmServer

SECRET = "planted-serving-token"


class Answers:
    """A server that gives each request the next of some answers, and the last one from then on."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes, dict[str, str]]] = []
        self.authorized: list[str | None] = []
        self.url = ""

    def next(self) -> tuple[int, bytes, dict[str, str]]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    monkeypatch.setattr(client, "PAUSE_SECONDS", 0.01)
    found = Answers()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            found.authorized.append(self.headers["Authorization"])
            status, body, headers = found.next()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield found
    http.shutdown()
    thread.join()
    http.server_close()


MODELS = json.dumps({"data": [{"id": "base"}, {"id": "demo-1-0123abcd", "parent": "base"}]}).encode()


def test_a_server_that_is_overloaded_is_asked_again(server: Answers) -> None:
    server.answers = [(503, b"", {}), (429, b"", {}), (200, MODELS, {})]
    assert VllmServer(server.url).models().keys() == {"base", "demo-1-0123abcd"}
    assert len(server.authorized) == 3


@pytest.mark.parametrize(
    ("status", "attempts", "diagnosis"), [(500, 3, ERROR), (400, 1, ERROR), (401, 1, TOKEN), (302, 1, ERROR)]
)
def test_attempts_are_bounded(server: Answers, status: int, attempts: int, diagnosis: str) -> None:
    server.answers = [(status, b"planted", {"Location": "http://127.0.0.1:1/elsewhere"})]
    with pytest.raises(ServerError) as error:
        VllmServer(server.url, SECRET).models()
    assert (error.value.status, error.value.diagnosis, len(server.authorized)) == (status, diagnosis, attempts)
    assert server.url in str(error.value)


def test_a_token_that_a_server_repeats_is_not_shown(server: Answers) -> None:
    server.answers = [(400, f"bad header Bearer {SECRET}".encode(), {})]
    with pytest.raises(ServerError) as error:
        VllmServer(server.url, SECRET).models()
    assert SECRET not in str(error.value)
    assert server.authorized == [f"Bearer {SECRET}"]


def test_a_password_of_netrc_is_not_sent(
    server: Answers, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    netrc = tmp_path_factory.mktemp("home") / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password planted\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    server.answers = [(200, MODELS, {})]
    VllmServer(server.url).models()
    assert server.authorized == [None]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 10_000,
        b'{"choices": []}',
        b'{"choices": [{"token_ids": [7]}]}',
        b'{"choices": [{"token_ids": [7], "logprobs": {"token_logprobs": [NaN]}}]}',
        b'{"choices": [{"token_ids": [8], "logprobs": {"token_logprobs": [-1.0]}}]}',
    ],
)
def test_an_answer_that_is_not_vllms_is_refused(server: Answers, body: bytes) -> None:
    server.answers = [(200, body, {})]
    with pytest.raises(ServerError) as error:
        VllmServer(server.url).logprob("demo", [5], 7)
    assert error.value.diagnosis == ERROR
    assert "/v1/completions" in str(error.value)


def test_an_endless_answer_is_cut_off(server: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_BYTES", 1_000)
    server.answers = [(200, b" " * 2_000, {})]
    with pytest.raises(ServerError, match="1,000 bytes"):
        VllmServer(server.url).models()


def test_nobody_listens() -> None:
    with pytest.raises(ServerError) as error:
        VllmServer("http://127.0.0.1:9", seconds=1).models()
    assert error.value.diagnosis in (ERROR, TIMEOUT)
    assert error.value.status == 0


def test_adapters_with_running_requests_are_those_of_the_newest_gauge(server: Answers) -> None:
    gauge = 'vllm:lora_requests_info{max_lora="4",running_lora_adapters="%s",waiting_lora_adapters="%s"} %s\n'
    text = "# TYPE x gauge\n" + gauge % ("a,b", "", "1.5e+09") + gauge % ("b", "c", "1.7e+09")
    server.answers = [(200, text.encode(), {})]
    assert VllmServer(server.url).busy() == {"b", "c"}
    server.answers = [(200, b"other 1\n", {})]
    assert VllmServer(server.url).busy() is None
