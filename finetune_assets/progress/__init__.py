"""How far a long thing is: a line in the log every few seconds, one at its end, and a bar where a terminal shows it."""

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

from finetune_assets.progress.relay import Display, State

EVERY_SECONDS = 5.0
"""How often a line is told; what is done sooner is not told of, but for large transfers."""
DRAWN_SECONDS = 0.1
RECENT_SECONDS = 20.0
"""What the speed, and with it the time left, is of."""
WORTH_TELLING = 10_000_000
"""Transfers of so many bytes are told of, however quick they are."""
THREADS = 4
logger = logging.getLogger(__name__)
clock = time.monotonic


class Stopped(Exception):
    """Another part of the same transfer has failed."""


@dataclass(frozen=True)
class Unit:
    """What is counted.

    Attributes:
        name: In the plural.
    """

    name: str

    def of(self, done: int, total: int | None) -> str:
        return f"{done:,} {self.name}" if total is None else f"{done:,} of {total:,} {self.name}"

    def rate(self, speed: float) -> str:
        if speed < 1:
            return f"{speed * 60:.1f} {self.name}/min"
        return f"{speed:,.{0 if speed >= 10 else 1}f} {self.name}/s"

    def is_worth_telling(self, done: int, seconds: float) -> bool:
        return seconds >= EVERY_SECONDS


class Bytes(Unit):
    """Bytes, in decimal units."""

    def of(self, done: int, total: int | None) -> str:
        return gigabytes(done) if total is None else f"{gigabytes(done)} of {gigabytes(total)}"

    def rate(self, speed: float) -> str:
        return f"{speed / 1e6:,.0f} MB/s"

    def is_worth_telling(self, done: int, seconds: float) -> bool:
        return done >= WORTH_TELLING


BYTES, ROWS, STEPS = Bytes("bytes"), Unit("rows"), Unit("steps")


class Progress:
    """Counts what is done of one long thing, from any number of threads. It never fails what it counts.

    Args:
        what: Such as `fetching base-models/owner/name`.
        total: How many in all; None if nobody knows.
        unit: What is counted.
        done: How many were done before, by somebody else.
        logs: Whether it tells lines; without, it is a bar alone.
    """

    display: Display | None = None
    """Where bars go; set when a process begins, not when this module is imported."""
    _numbers = itertools.count()

    def __init__(self, what: str, total: int | None, unit: Unit = BYTES, done: int = 0, logs: bool = True) -> None:
        self.what, self.total, self.unit, self.logs = what, total, unit, logs
        self.done = self.before = done
        self.began = self.told = clock()
        self.drawn = 0.0
        self.note = ""
        """Stands in a bar instead of the speed."""
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
        """So many more.

        Raises:
            Stopped: if the transfer has failed elsewhere.
        """
        if self._stop.is_set():
            raise Stopped
        self._count(count)

    def reach(self, count: int) -> None:
        """So many by now."""
        self._count(max(0, count - self.done))

    def _count(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = clock()
            self._remember(now)
            tells = self.logs and now - self.told >= EVERY_SECONDS and self.done != self.total
            draws = now - self.drawn >= DRAWN_SECONDS
            if tells:
                self.told = now
            if draws:
                self.drawn = now
        if tells:
            line = f"{self.what}: {self.line()}"
            self.says(line)
            logger.info("%s", line)
        elif draws:
            self._show()

    def _remember(self, now: float) -> None:
        """Keep the newest count that is old enough to tell the speed by, and what came after it."""
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and self._recent[1][0] <= now - RECENT_SECONDS:
            self._recent.popleft()
        if len(self._recent) > 2 and now - self._recent[-3][0] < RECENT_SECONDS / 100:
            del self._recent[-2]

    def take_back(self, count: int) -> None:
        """So many must be done again."""
        with self._lock:
            self.done -= count

    def stop(self) -> None:
        self._stop.set()

    def says(self, line: str) -> None:
        """A line that is told by somebody says no more than this: where a bar is drawn it need not be shown."""
        self._show(said=line)

    def line(self) -> str:
        speed = f"{self.unit.of(self.done, self.total)} · {self.unit.rate(self._speed())}"
        if self.total is None:
            return speed
        left = self._left()
        return f"{speed} · ETA {'unknown' if left is None else timedelta(seconds=round(left))}"

    def summary(self) -> str:
        seconds = clock() - self.began
        rate = self.unit.rate((self.done - self.before) / max(seconds, 1e-3))
        return f"{self.unit.of(self.done, None)} in {seconds:.1f} s · {rate}"

    def _speed(self) -> float:
        (since, before), (_, done) = self._recent[0], self._recent[-1]
        return max(0, done - before) / max(clock() - since, 1e-3)

    def _left(self) -> float | None:
        speed = self._speed()
        return None if self.total is None or not speed else max(0, self.total - self.done) / speed

    def _show(self, said: str = "", ended: bool = False) -> None:
        if self.display is None:
            return
        speed, seconds = self._speed(), clock() - self.began
        beside = self.note or (self.unit.rate(speed) if speed else "")
        text = self.unit.of(self.done, self.total) + (f" · {beside}" if beside else "")
        state = State(self.key, self.what, self.done, self.total, text, seconds, self._left())
        self.display.show(replace(state, said=said, ended=ended))


def gigabytes(count: float) -> str:
    """Bytes for people, in decimal units: `16.1 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def in_parallel(jobs: Iterable[Callable[[], None]], progress: Progress) -> None:
    """Run the parts of a transfer, a few at once; the first error ends them all."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also where this thread is interrupted
            if not all(future.done() and not future.exception() for future in futures):
                progress.stop()
                for future in futures:
                    future.cancel()
        errors = [future.exception() for future in futures if not future.cancelled()]
        if error := next((e for e in errors if e and not isinstance(e, Stopped)), None):
            raise error
