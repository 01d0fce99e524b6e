"""A real vLLM server on the CPU for one test, and clients that ask it all the while."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks import vllm_server
from benchmarks.vllm_server import NotInstalled, VllmProcess
from finetune_assets.serving.errors import ServerError
from finetune_assets.serving.state import ServedRecords
from finetune_assets.serving.vllm import VllmServer
from finetune_assets.store.artifacts import ArtifactStore

SLOTS = 16
"""More than the adapters that a test loads: on a CPU, vLLM answers requests for the base model beside requests for
adapters with the adapter in the last slot."""
LONGEST = 192
PERIOD_SECONDS, AT_ONCE = 4.0, 3
"""Clients ask together, three times each."""
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The model is in the process of the engine: a worker of its own takes as long to start again, and spins for a second
after each request."""


@contextmanager
def running(model: Path, name: str, folder: Path, template: Path | None = None) -> Iterator[VllmProcess]:
    """A server with a model; skips the test where vLLM cannot be installed.

    Args:
        model: Folder of the model.
        name: Its name on the server.
        folder: Folder for its log.
        template: Chat template; None for the model's own.
    """
    try:
        vllm_server.install()
    except NotInstalled as e:
        pytest.skip(str(e))
    more = ["--max-loras", str(SLOTS), "--distributed-executor-backend", "uni"]
    more += ["--chat-template", str(template)] if template else []
    command, log = vllm_server.command(model, name, LONGEST, *more), folder / f"vllm-{name}.log"
    with vllm_server.running(command, log, ONE_PROCESS) as server:
        yield server


def chat(url: str, model: str, messages: list[dict[str, Any]], most: int) -> str:
    """The greedy answer to plain messages, as a user's client asks for it."""
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": most}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@dataclass(frozen=True)
class Answer:
    """What a client got.

    Attributes:
        at: When it asked, as `time.monotonic`.
        name: Model or adapter that it asked for.
        logprob: Log-probability of its token; None after an error.
        error: The error.
    """

    at: float
    name: str
    logprob: float | None
    error: str = ""


@dataclass
class Client:
    """Asks each model for the probability of one token again and again, by the name that the alias has at that time.

    Attributes:
        url: Address of the server.
        store: Store with the records of what serves.
        experiments: Experiments whose adapters it asks.
        base: Name of the base model, which it asks too.
        prompt: Token ids.
        token: Token id.
    """

    url: str
    store: ArtifactStore
    experiments: tuple[str, ...]
    base: str
    prompt: list[int]
    token: int
    answers: list[Answer] = field(default_factory=list)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask until the context ends."""
        ended = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(ended, name)) for name in (*self.experiments, "")]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()

    def _ask(self, ended: threading.Event, experiment: str) -> None:
        server, records = VllmServer(self.url, seconds=60.0), ServedRecords(self.store, experiment)
        while not ended.wait(PERIOD_SECONDS - time.monotonic() % PERIOD_SECONDS):
            for _ in range(AT_ONCE):
                self._ask_once(server, records, experiment)

    def _ask_once(self, server: VllmServer, records: ServedRecords, experiment: str) -> None:
        served = records.current() if experiment else None
        if experiment and not served:
            return
        name, at = served.name if served else self.base, time.monotonic()
        try:
            answer = Answer(at, name, server.logprob(name, self.prompt, self.token))
        except ServerError as e:
            answer = Answer(at, name, None, str(e))
        self.answers.append(answer)

    def failed(self, *outages: tuple[float, float]) -> list[Answer]:
        """Answers that are errors, outside of the outages."""
        errors = [answer for answer in self.answers if answer.error]
        return [answer for answer in errors if not any(begin <= answer.at <= end for begin, end in outages)]

    def wrong(self, expected: Mapping[str, float], tolerance: float) -> list[Answer]:
        """Answers that are not those of the model that was asked."""
        known = [answer for answer in self.answers if answer.logprob is not None]
        return [answer for answer in known if abs((answer.logprob or 0.0) - expected[answer.name]) > tolerance]
