"""Progress bars at the bottom of a terminal. One process draws them and prints all other output above them."""

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
from finetune_assets.progress.relay import BarState

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

SHOWN_SECONDS = 0.5
"""Elapsed time from which a bar is drawn, in seconds."""
DRAWN_A_SECOND = 5
"""Refresh rate of the bars, in Hz."""
COVERED = 100
"""Number of recent log lines to remember as duplicates of a bar."""
ROOMY = 100
"""Terminal width from which both elapsed and remaining time are shown, in columns."""
ECHO = "^C"
"""Text that the terminal echoes at the cursor on Ctrl-C. Without room for it, the bar would wrap to the next line."""
CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Terminal:
    """A terminal as a file object that never raises: output that the terminal does not accept is dropped.

    Args:
        number: File descriptor of the terminal, which is duplicated.
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
        """Do nothing, because writes are unbuffered."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def size(self) -> tuple[int, int]:
        """Return the usable columns and lines, based on 80 and 24 if the terminal does not report its size."""
        columns = lines = 0
        with suppress(OSError):
            columns, lines = os.get_terminal_size(self.number)
        return max(1, (columns or 80) - len(ECHO)), lines or 24


class Screen:
    """Draws the bars of the operations in progress, and prints other output above them.

    Log lines that duplicate a bar are left out.

    Args:
        terminal: Terminal to draw on.
        console: Console of rich for the same terminal.
    """

    def __init__(self, terminal: Terminal, console: "Console") -> None:
        self.terminal, self.console = terminal, console
        self.states: dict[str, tuple[BarState, float]] = {}
        """States and their arrival times, by key. Updates replace the dictionary, because another thread draws it."""
        self._live: Live | None = None
        self._duplicates: deque[str] = deque(maxlen=COVERED)
        self._rest, self._is_mid_line = "", False
        self._lock = threading.RLock()

    def show(self, state: BarState) -> None:
        """Draw or update the bar of a state, or remove it if the operation has ended."""
        with self._lock:
            if state.log_line:
                self._duplicates.append(state.log_line)
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
        """Print complete lines; an incomplete line is buffered until its end or `flush`."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                if CODES.sub("", line).rstrip().endswith(tuple(self._duplicates)):
                    continue
                if self._live:
                    self.console.out(line.rstrip("\r"), highlight=False)
                else:
                    self.terminal.write(f"{line}\n")
                    self._is_mid_line = False
        return len(text)

    def flush(self) -> None:
        """Print an incomplete line, such as an input prompt, unless a bar is drawn."""
        with self._lock:
            if self._rest and not self._live:
                self.terminal.write(self._rest)
                self._rest, self._is_mid_line = "", True

    def close(self) -> None:
        """Remove all bars, and print the buffered output."""
        with self._lock:
            for state, _ in self.states.values():
                self.show(replace(state, log_line="", ended=True))
            self.flush()

    def _table(self) -> "Table":
        from rich.console import ConsoleDimensions
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        self.console.size = ConsoleDimensions(*self.terminal.size())
        table, now = Table.grid(padding=(0, 1), expand=True), time.monotonic()
        table.add_column()  # the first to be truncated if the terminal is narrow
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


def _times(state: BarState, passed: float, narrow: bool) -> str:
    """Format elapsed and remaining time, `passed` seconds after a state; if `narrow`, only the remaining time."""
    elapsed = str(timedelta(seconds=int(state.seconds + passed)))
    if state.left is None:
        return elapsed
    left = f"ETA {timedelta(seconds=round(max(0.0, state.left - passed)))}"
    return left if narrow else f"{elapsed}, {left}"


@contextmanager
def drawn() -> Iterator[TextIO | Screen]:
    """Draw the bars of this process on stderr, if it is an interactive terminal.

    Yields:
        File object for lines to print above the bars.
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
    """Return whether a file descriptor is open and a terminal."""
    try:
        return os.isatty(number)
    except OSError:
        return False
