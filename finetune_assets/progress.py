"""How far a transfer is: a line every few seconds, and one at its end."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import timedelta
from types import TracebackType

EVERY_SECONDS = 5.0
WORTH_TELLING = 10_000_000
"""Transfers of fewer bytes are not told of."""
THREADS = 4
logger = logging.getLogger(__name__)


class Stopped(Exception):
    """Another part of the same transfer has failed."""


class Progress:
    """Counts the bytes of one transfer, from any number of threads.

    Args:
        what: Such as `fetching base-models/owner/name`.
        total: Bytes in all.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = self.told = time.monotonic()
        self._lock, self._stop = threading.Lock(), threading.Event()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self.done >= WORTH_TELLING:
            logger.info("%s: %s", self.what, self.summary())

    def add(self, count: int) -> None:
        """So many bytes more.

        Raises:
            Stopped: if the transfer has failed elsewhere.
        """
        if self._stop.is_set():
            raise Stopped
        self._count(count)

    def reach(self, count: int) -> None:
        """So many bytes by now."""
        self._count(max(0, count - self.done))

    def _count(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self.told < EVERY_SECONDS:
                return
            self.told = now
        logger.info("%s: %s", self.what, self.line())

    def take_back(self, count: int) -> None:
        """So many bytes must be moved again."""
        with self._lock:
            self.done -= count

    def stop(self) -> None:
        self._stop.set()

    def line(self) -> str:
        speed = self._speed()
        left = timedelta(seconds=round((self.total - self.done) / speed)) if speed else "unknown"
        return f"{gigabytes(self.done)} of {gigabytes(self.total)} · {speed / 1e6:,.0f} MB/s · ETA {left}"

    def summary(self) -> str:
        return f"{gigabytes(self.done)} in {time.monotonic() - self.began:.1f} s · {self._speed() / 1e6:,.0f} MB/s"

    def _speed(self) -> float:
        return self.done / max(time.monotonic() - self.began, 1e-3)


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
