"""Report the progress of long operations: periodic log lines, a summary at the end, and a bar on terminals."""

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType

from finetune_assets.progress.relay import BarState, Display

EVERY_SECONDS = 5.0
"""Interval of log lines, in seconds. Shorter operations are not logged, except for large transfers."""
DRAWN_SECONDS = 0.1
"""Minimum interval between updates of a bar, in seconds."""
RECENT_SECONDS = 20.0
"""Period over which speed and remaining time are computed, in seconds."""
WORTH_TELLING = 10_000_000
"""Size from which a transfer is logged regardless of its duration, in bytes."""
THREADS = 4
"""Number of parts of a transfer that run in parallel."""
logger = logging.getLogger(__name__)
clock = time.monotonic


class Stopped(Exception):
    """Raised in the other parts of a transfer after one part has failed."""


@dataclass(frozen=True)
class Unit:
    """Unit in which progress is counted.

    Attributes:
        name: Name of the unit, in the plural.
    """

    name: str

    def of(self, done: int, total: int | None) -> str:
        """Format a count, such as `3 of 10 rows`."""
        return f"{done:,} {self.name}" if total is None else f"{done:,} of {total:,} {self.name}"

    def rate(self, speed: float) -> str:
        """Format a speed, given in units per second."""
        if speed < 1:
            return f"{speed * 60:.1f} {self.name}/min"
        return f"{speed:,.{0 if speed >= 10 else 1}f} {self.name}/s"

    def is_worth_telling(self, done: int, seconds: float) -> bool:
        """Return whether a finished operation is logged."""
        return seconds >= EVERY_SECONDS


class Bytes(Unit):
    """Bytes, formatted in decimal units."""

    def of(self, done: int, total: int | None) -> str:
        return gigabytes(done) if total is None else f"{gigabytes(done)} of {gigabytes(total)}"

    def rate(self, speed: float) -> str:
        return f"{speed / 1e6:,.0f} MB/s"

    def is_worth_telling(self, done: int, seconds: float) -> bool:
        return done >= WORTH_TELLING


BYTES, ROWS, STEPS = Bytes("bytes"), Unit("rows"), Unit("steps")


class Progress:
    """Counts the progress of one operation. It is thread-safe, and its display never raises into the operation.

    Args:
        what: Name of the operation, such as `fetching base-models/owner/name`.
        total: Total number of units, or None if it is unknown.
        unit: Unit of the counts.
        done: Number of units completed before this process started, such as by an earlier run.
        logs: Whether to write log lines in addition to the bar.
    """

    display: Display | None = None
    """Display that draws the bars. It is set when a process starts, not when this module is imported."""
    _numbers = itertools.count()

    def __init__(self, what: str, total: int | None, unit: Unit = BYTES, done: int = 0, logs: bool = True) -> None:
        self.what, self.total, self.unit, self.logs = what, total, unit, logs
        self.done = self.before = done
        self.began = self.logged_at = clock()
        self.drawn = 0.0
        self.note = ""
        """Text that a bar shows instead of the speed."""
        self.key = f"{os.getpid()}-{next(self._numbers)}"
        self._recent = deque([(self.began, done)])
        self._lock, self._stop = threading.Lock(), threading.Event()

    def __enter__(self) -> "Progress":
        self._show()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._show(ended=True)
        if kind is None and self.logs and self.unit.is_worth_telling(self.done, clock() - self.began):
            logger.info("%s: %s", self.what, self.summary())

    def add(self, count: int) -> None:
        """Add `count` completed units.

        Raises:
            Stopped: if another part of the transfer has failed.
        """
        if self._stop.is_set():
            raise Stopped
        self._count(count)

    def reach(self, count: int) -> None:
        """Set the number of completed units to `count`, unless it is already higher."""
        self._count(max(0, count - self.done))

    def _count(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = clock()
            self._remember(now)
            should_log = self.logs and now - self.logged_at >= EVERY_SECONDS and self.done != self.total
            should_draw = now - self.drawn >= DRAWN_SECONDS
            if should_log:
                self.logged_at = now
            if should_draw:
                self.drawn = now
        if should_log:
            line = f"{self.what}: {self.line()}"
            self.log_line(line)
            logger.info("%s", line)
        elif should_draw:
            self._show()

    def _remember(self, now: float) -> None:
        """Append the current count, and drop samples that are too old or too dense to compute the speed from."""
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and self._recent[1][0] <= now - RECENT_SECONDS:
            self._recent.popleft()
        if len(self._recent) > 2 and now - self._recent[-3][0] < RECENT_SECONDS / 100:
            del self._recent[-2]

    def take_back(self, count: int) -> None:
        """Subtract `count` units that have to be repeated."""
        with self._lock:
            self.done -= count

    def stop(self) -> None:
        """Make `add` raise `Stopped` in all threads."""
        self._stop.set()

    def log_line(self, line: str) -> None:
        """Register a log line that duplicates the bar, so that terminals with a bar leave it out."""
        self._show(line)

    def line(self) -> str:
        """Format the current progress: counts, speed and remaining time."""
        speed = f"{self.unit.of(self.done, self.total)} · {self.unit.rate(self._speed())}"
        if self.total is None:
            return speed
        left = self._left()
        return f"{speed} · ETA {'unknown' if left is None else timedelta(seconds=round(left))}"

    def summary(self) -> str:
        """Format the counts, duration and mean speed of a finished operation."""
        seconds = clock() - self.began
        rate = self.unit.rate((self.done - self.before) / max(seconds, 1e-3))
        return f"{self.unit.of(self.done, None)} in {seconds:.1f} s · {rate}"

    def _speed(self) -> float:
        (since, before), (_, done) = self._recent[0], self._recent[-1]
        return max(0, done - before) / max(clock() - since, 1e-3)

    def _left(self) -> float | None:
        speed = self._speed()
        return None if self.total is None or not speed else max(0, self.total - self.done) / speed

    def _show(self, line: str = "", ended: bool = False) -> None:
        if self.display is None:
            return
        speed, seconds = self._speed(), clock() - self.began
        note = self.note or (self.unit.rate(speed) if speed else "")
        text = self.unit.of(self.done, self.total) + (f" · {note}" if note else "")
        state = BarState(self.key, self.what, self.done, self.total, text, seconds, self._left())
        self.display.show(replace(state, log_line=line, ended=ended))


def gigabytes(count: float) -> str:
    """Format a number of bytes in decimal units, such as `16.1 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def in_parallel(jobs: Iterable[Callable[[], None]], progress: Progress) -> None:
    """Run the parts of a transfer in a thread pool. The first error stops all parts and is raised.

    Args:
        jobs: Functions that each transfer one part.
        progress: Progress of the whole transfer.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also if this thread is interrupted
            if not all(future.done() and not future.exception() for future in futures):
                progress.stop()
                for future in futures:
                    future.cancel()
        errors = [future.exception() for future in futures if not future.cancelled()]
        if error := next((e for e in errors if e and not isinstance(e, Stopped)), None):
            raise error
