"""Runs a function in a child process with limits, and measures what it takes."""

import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass

SECONDS, MEMORY_BYTES = 5, 1 << 30
ADDRESSES = 4 << 30
"""Address space beyond that of this process; allocators reserve more than they use."""


@dataclass(frozen=True)
class Outcome:
    """How a function ended.

    Attributes:
        error: Type of its exception; empty if it returned; `killed` if it exceeded a limit.
        text: The exception's message, or what it returned.
        seconds: CPU time.
        memory: Growth of the resident memory, in bytes.
    """

    error: str
    text: str
    seconds: float
    memory: int

    def check(self, expected: tuple[str, ...] = ("", "DataError", "ConfigError")) -> None:
        """Fail unless it ended within the limits with one line."""
        assert self.error in expected, self
        assert self.seconds <= SECONDS, self
        assert self.memory <= MEMORY_BYTES, self
        assert self.error == "" or (self.text and "\n" not in self.text), self
        assert all(char.isprintable() or char in "\u200c\u200d" for char in self.text), self


def run_limited(function: Callable[[], object]) -> Outcome:
    """Run a function in a fork of this process."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(source)
            _run(function, sink)
        finally:
            os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as answer:
        content = answer.read()
    os.waitpid(child, 0)
    return Outcome(**json.loads(content)) if content else Outcome("killed", "", 0.0, 0)


def _run(function: Callable[[], object], sink: int) -> None:
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
    addresses = pages * resource.getpagesize() + ADDRESSES
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    limit = int(used.ru_utime + used.ru_stime) + 4 * SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    error = ""
    try:
        text = str(function())
    except BaseException as e:
        error, text = type(e).__name__, str(e)
    now = resource.getrusage(resource.RUSAGE_SELF)
    seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    memory = max(0, now.ru_maxrss - used.ru_maxrss) * 1024
    answer = {"error": error, "text": text[:5_000], "seconds": seconds, "memory": memory}
    os.write(sink, json.dumps(answer).encode())
