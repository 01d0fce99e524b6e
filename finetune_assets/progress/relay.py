"""Send the states of progress bars from a job's processes through a named pipe to the process that owns the terminal.

Only one process may draw on a terminal; the others send it the states of their bars. Neither side blocks: without a
reader, or if the pipe is full, a state is dropped, and the next one supersedes it.
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
"""Environment variable with the path of the named pipe."""
ATOMIC_BYTES = 4096
"""Size up to which a write to a pipe is atomic, in bytes (PIPE_BUF on Linux)."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class BarState:
    """State of a progress bar.

    Attributes:
        key: Key of the bar, unique across processes.
        what: Name of the operation, such as `tokenizing`.
        done: Number of completed units.
        total: Total number of units, or None if it is unknown.
        text: Counts and speed as text.
        seconds: Elapsed time, in seconds.
        left: Remaining time, in seconds, or None if it is unknown.
        log_line: Log line that accompanies this state and duplicates it; empty if none.
        ended: Whether to remove the bar.
    """

    key: str
    what: str
    done: int
    total: int | None
    text: str
    seconds: float
    left: float | None
    log_line: str = ""
    ended: bool = False


class Display(Protocol):
    """Draws bars, or forwards their states to a process that does. It never raises."""

    def show(self, state: BarState) -> None: ...


class Sender:
    """Sends the states of bars through a named pipe.

    Args:
        path: Path of the named pipe.
    """

    def __init__(self, path: str) -> None:
        self.pipe: int | None = None
        with suppress(OSError):
            self.pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)

    def show(self, state: BarState) -> None:
        line = json.dumps(asdict(state)).encode() + b"\n"
        if self.pipe is not None and len(line) <= ATOMIC_BYTES:
            with suppress(OSError):
                os.write(self.pipe, line)


def from_environment() -> Display | None:
    """Return the display for this process, or None if its launcher draws no bars or its rank is not 0."""
    path = os.environ.get(VARIABLE)
    return Sender(path) if path and os.environ.get("RANK", "0") == "0" else None


@contextmanager
def heard(folder: Path, display: Display | None) -> Iterator[Mapping[str, str]]:
    """Show the bars of other processes inside the context, and remove remaining bars at its end.

    Args:
        folder: Folder in which the named pipe is created.
        display: Display that draws the bars. If None, the other processes send no states.

    Yields:
        Environment variables for the other processes.
    """
    if display is None:
        yield {}
        return
    path, ended = folder / "progress", threading.Event()
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # also for writing: else reading ends with the last writer
    reader = threading.Thread(target=_pass_on, args=(pipe, display, ended), daemon=True)
    reader.start()
    try:
        yield {VARIABLE: str(path)}
    finally:
        ended.set()
        reader.join()
        os.close(pipe)


def _pass_on(pipe: int, display: Display, ended: threading.Event) -> None:
    rest, shown = b"", dict[str, BarState]()
    while not ended.is_set():
        if not select.select([pipe], [], [], POLL_SECONDS)[0]:
            continue
        *lines, rest = (rest + os.read(pipe, 65536)).split(b"\n")
        for line in lines:
            with suppress(ValueError, TypeError):
                state = BarState(**json.loads(line))
                shown[state.key] = state
                display.show(state)
    for state in shown.values():
        display.show(replace(state, log_line="", ended=True))
