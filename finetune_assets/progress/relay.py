"""What a bar shows, and how it comes from a job's processes to the one that owns the terminal: through a named pipe.

Only one process may draw on a terminal. The others send it what they would draw, and nobody waits for anybody: where
nobody reads, or the pipe is full, a state is lost, and the next one says more.
"""

import json
import os
import select
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

VARIABLE = "FINETUNE_PROGRESS"
"""Environment variable: the named pipe's path."""
ATOMIC_BYTES = 4096
"""So much is written to a pipe as one piece, whoever else writes to it (Linux; PIPE_BUF)."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class State:
    """What a bar shows.

    Attributes:
        key: Tells it from others, of other processes too.
        what: Such as `tokenizing`.
        done: How many.
        total: Of how many, if that is known.
        text: Both in words, and how fast it goes.
        seconds: Since it began.
        left: Seconds until its end, if that is known.
        said: A line that is told just now and says no more than this; empty without one.
        ended: Whether the bar goes.
    """

    key: str
    what: str
    done: int
    total: int | None
    text: str
    seconds: float
    left: float | None
    said: str = ""
    ended: bool = False


class Display(Protocol):
    """What draws bars, or passes on what they show to what does. It never raises."""

    def show(self, state: State) -> None: ...


class Sender:
    """Passes on what is to be shown.

    Args:
        path: The named pipe.
    """

    def __init__(self, path: str) -> None:
        self.pipe: int | None = None
        with suppress(OSError):
            self.pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)

    def show(self, state: State) -> None:
        line = json.dumps(asdict(state)).encode() + b"\n"
        if self.pipe is not None and len(line) <= ATOMIC_BYTES:
            with suppress(OSError):
                os.write(self.pipe, line)


def from_environment() -> Display | None:
    """Where this process's bars go, if its launcher shows them; of processes that do the same together the first's."""
    path = os.environ.get(VARIABLE)
    return Sender(path) if path and os.environ.get("RANK", "0") == "0" else None


@contextmanager
def heard(folder: Path, display: Display | None) -> Iterator[Mapping[str, str]]:
    """Show what other processes send, meanwhile; what they leave behind goes at the end.

    Args:
        folder: For the named pipe.
        display: Shows it; without one nobody sends.

    Yields:
        Environment variables for those processes.
    """
    if display is None:
        yield {}
        return
    path, ended = folder / "progress", threading.Event()
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # to write too: else it ends with whoever writes
    reader = threading.Thread(target=_pass_on, args=(pipe, display, ended), daemon=True)
    reader.start()
    try:
        yield {VARIABLE: str(path)}
    finally:
        ended.set()
        reader.join()
        os.close(pipe)


def _pass_on(pipe: int, display: Display, ended: threading.Event) -> None:
    rest, shown = b"", dict[str, State]()
    while not ended.is_set():
        if not select.select([pipe], [], [], POLL_SECONDS)[0]:
            continue
        *lines, rest = (rest + os.read(pipe, 65536)).split(b"\n")
        for line in lines:
            with suppress(ValueError, TypeError):
                state = State(**json.loads(line))
                shown[state.key] = state
                display.show(state)
    for state in shown.values():
        display.show(replace(state, said="", ended=True))
