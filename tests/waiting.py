"""Waiting for what other processes and threads do."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_for(found: Callable[[], T], seconds: float = 300, every: float = 0.1, log: Path | None = None) -> T:
    """What `found` returns, as soon as it is something; it is asked again after `every` seconds.

    Args:
        found: What is waited for.
        seconds: How long at most.
        every: Pause between two questions.
        log: File whose end is shown if nothing was found.
    """
    deadline = time.monotonic() + seconds
    while not (now := found()):
        assert time.monotonic() < deadline, f"not within {seconds} s; {log.read_text()[-3000:] if log else 'no log'}"
        time.sleep(every)
    return now
