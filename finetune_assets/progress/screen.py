"""Bars at the bottom of a terminal. One process draws, and whatever else is written comes as lines above them."""

import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import parent_process
from typing import TYPE_CHECKING, TextIO

from finetune_assets.progress import Progress
from finetune_assets.progress.relay import State

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

SHOWN_SECONDS = 0.5
"""What is done sooner is not drawn."""
DRAWN_A_SECOND = 5
COVERED = 100
"""Lines that are remembered as said by a bar."""
ROOMY = 100
"""Columns in which there is room for all times."""
ECHO = "^C"
"""The terminal itself writes it where the cursor is; without room for it the bar would go on in the next line."""
CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Terminal:
    """A terminal as a file that is never in the way: what it does not take is lost.

    Args:
        number: Its file descriptor; a copy is kept.
    """

    encoding = "utf-8"

    def __init__(self, number: int) -> None:
        self.number = os.dup(number)

    def write(self, text: str) -> int:
        left = text.encode(errors="replace")
        with suppress(OSError):
            while left:
                left = left[os.write(self.number, left) :]
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def size(self) -> tuple[int, int]:
        """Columns and lines that may be drawn in; 80 and 24 where it does not say how many it has."""
        columns = lines = 0
        with suppress(OSError):
            columns, lines = os.get_terminal_size(self.number)
        return max(1, (columns or 80) - len(ECHO)), lines or 24


class Screen:
    """Draws the bars of what is going on, and prints lines above them.

    A line that says no more than a bar does is left out.

    Args:
        terminal: Where.
        console: Of rich, on the same.
    """

    def __init__(self, terminal: Terminal, console: "Console") -> None:
        self.terminal, self.console = terminal, console
        self.states: dict[str, tuple[State, float]] = {}
        """By key, with when each came; replaced as a whole, because it is drawn in another thread."""
        self._live: Live | None = None
        self._said: deque[str] = deque(maxlen=COVERED)
        self._rest, self._is_mid_line = "", False
        self._lock = threading.RLock()

    def show(self, state: State) -> None:
        with self._lock:
            if state.said:
                self._said.append(state.said)
            if state.ended:
                self.states = {key: other for key, other in self.states.items() if key != state.key}
            else:
                self.states = {**self.states, state.key: (state, time.monotonic())}
            if self.states and not self._live:
                self._begin()
            elif not self.states and self._live:
                self._live.stop()
                self._live = None

    def _begin(self) -> None:
        from rich.live import Live

        if self._is_mid_line:
            self.terminal.write("\n")
            self._is_mid_line = False
        self._live = Live(
            console=self.console,
            get_renderable=self._table,
            refresh_per_second=DRAWN_A_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def write(self, text: str) -> int:
        """Print whole lines; the rest waits for its end, or for `flush`."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                if CODES.sub("", line).rstrip().endswith(tuple(self._said)):
                    continue
                if self._live:
                    self.console.out(line.rstrip("\r"), highlight=False)
                else:
                    self.terminal.write(f"{line}\n")
                    self._is_mid_line = False
        return len(text)

    def flush(self) -> None:
        """Show what has no line end yet (somebody may be asked something), unless that would hit a bar."""
        with self._lock:
            if self._rest and not self._live:
                self.terminal.write(self._rest)
                self._rest, self._is_mid_line = "", True

    def close(self) -> None:
        """Take all bars away, and show what is left."""
        with self._lock:
            for state, _ in self.states.values():
                self.show(replace(state, said="", ended=True))
            self.flush()

    def _table(self) -> "Table":
        from rich.console import ConsoleDimensions
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        self.console.size = ConsoleDimensions(*self.terminal.size())
        table, now = Table.grid(padding=(0, 1), expand=True), time.monotonic()
        table.add_column()  # the first to be cut where the terminal is narrow
        table.add_column(ratio=1, no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        for state, since in self.states.values():
            passed = now - since
            if state.seconds + passed < SHOWN_SECONDS:
                continue
            bar = ProgressBar(state.total, state.done, pulse=state.total is None)
            what = Text(state.what, no_wrap=True, overflow="ellipsis")
            table.add_row(what, bar, Text(state.text), _times(state, passed, self.console.width < ROOMY))
        return table


def _times(state: State, passed: float, narrow: bool) -> str:
    """How long it has taken and will take, so many seconds after that state; in a narrow terminal the latter alone."""
    elapsed = str(timedelta(seconds=int(state.seconds + passed)))
    if state.left is None:
        return elapsed
    left = f"ETA {timedelta(seconds=round(max(0.0, state.left - passed)))}"
    return left if narrow else f"{elapsed}, {left}"


@contextmanager
def drawn() -> Iterator[TextIO | Screen]:
    """Draw this process's bars on stderr, if a person looks at it.

    Yields:
        What takes lines that are to stand above them.
    """
    screen = _screen()
    if screen is None:
        yield sys.stderr
        return
    Progress.display = screen
    try:
        yield screen
    finally:
        Progress.display = None
        screen.close()


def _screen() -> Screen | None:
    if Progress.display is not None or parent_process() or not is_terminal(2):
        return None
    from rich.console import Console

    terminal = Terminal(2)
    console = Console(file=terminal)  # type: ignore[arg-type]
    return Screen(terminal, console) if console.is_interactive else None


def is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:
        return False
