"""Locks between the processes of one machine, which the kernel frees when their holder dies, even by SIGKILL."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

POLL_SECONDS = 0.1
TELL_SECONDS = 5.0
logger = logging.getLogger(__name__)


class Lock:
    """An advisory lock on a file (flock), held by many (`shared`) or by one.

    A holder that is alone may leave a note in the file, for those who wait to read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self, shared: bool = False, blocking: bool = True) -> bool:
        """Take the lock; False if another has it and `blocking` is off."""
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if blocking else fcntl.LOCK_NB)
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, how)
                if self._is_there(file):
                    self._file = file
                    return True
            except BlockingIOError:
                os.close(file)
                return False
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # its last holder removed the file meanwhile

    def _is_there(self, file: int) -> bool:
        try:
            return os.fstat(file).st_ino == self.path.stat().st_ino
        except FileNotFoundError:
            return False

    def release(self, remove: bool = False) -> None:
        """Give the lock back. With `remove`, which only a holder who is alone may ask for, its file goes too."""
        if self._file is not None:
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def touch(self) -> None:
        """Set the file's time to now."""
        os.utime(self.path)

    def note(self, text: str) -> None:
        """Leave a note for those who wait."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text.encode(), 0)

    def read_note(self) -> str:
        """What the holder has left, or an empty text."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


class _Noting(logging.Handler):
    """Leaves what is logged while a lock is held as the note to those who wait for it."""

    def __init__(self, lock: Lock, who: str) -> None:
        super().__init__(logging.INFO)
        self.held, self.who = lock, who

    def emit(self, record: logging.LogRecord) -> None:
        self.held.note(f"{self.who}; {record.getMessage()}")


@contextmanager
def alone(path: Path, doing: str) -> Iterator[None]:
    """Let one process of this machine at a time do something; the others wait, and tell what for.

    Args:
        path: The lock's file.
        doing: Such as `fetches base-models/owner/name`.
    """
    lock = Lock(path)
    began = told = time.monotonic()
    while not lock.acquire(blocking=False):
        if time.monotonic() - told >= (TELL_SECONDS if told > began else 0.5):
            told = time.monotonic()
            logger.info("Waiting for %s", lock.read_note() or f"the lock of another process ({doing})")
        time.sleep(POLL_SECONDS)
    who = f"the lock held by PID {os.getpid()} ({doing}, since {datetime.now():%H:%M:%S})"
    lock.note(who)
    noting, package = _Noting(lock, who), logging.getLogger("finetune_assets")
    package.addHandler(noting)
    try:
        yield
    finally:
        package.removeHandler(noting)
        lock.release(remove=True)
