"""File locks between processes on one machine. The kernel releases them when the holder dies, even by SIGKILL."""

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from finetune_assets.store import modes
from finetune_assets.store.errors import StoreError

POLL_SECONDS = 0.1
LOG_INTERVAL_SECONDS = 5.0
EXISTING = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Without O_CREAT, which Linux denies for another user's file in a sticky folder (fs.protected_regular)."""
logger = logging.getLogger(__name__)


class Lock:
    """An advisory lock on a file (flock), shared or exclusive.

    An exclusive holder may write a note into the file for waiting processes to read.

    Args:
        path: The lock file.
        mode: Mode of a new lock file; by default, that of this project's files.
    """

    def __init__(self, path: Path, mode: int | None = None) -> None:
        self.path, self.mode = path, mode
        self._file: int | None = None

    def acquire(self, shared: bool = False, blocking: bool = True) -> bool:
        """Acquire the lock; return False if another process holds it and `blocking` is False.

        Raises:
            StoreError: If the lock file is a link, or not a regular file.
        """
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if blocking else fcntl.LOCK_NB)
        while True:
            file = self._open()
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
            os.close(file)  # the last holder has removed the file in the meantime

    def _open(self) -> int:
        """Open the lock file, creating it if it is missing. No link is followed, and only a new file's mode is set."""
        modes.make_folders(self.path.parent)
        mode = modes.file_mode() if self.mode is None else self.mode
        while True:
            try:
                file = os.open(self.path, EXISTING)
            except FileNotFoundError:
                with suppress(FileExistsError):
                    file = os.open(self.path, EXISTING | os.O_CREAT | os.O_EXCL, mode)
                    os.fchmod(file, mode)
                    return file
                continue
            except OSError as e:
                raise StoreError(f"{self.path}: cannot be locked ({e.strerror}); remove it, or ask its owner to") from e
            if stat.S_ISREG(os.fstat(file).st_mode):
                return file
            os.close(file)
            raise StoreError(f"{self.path}: cannot be locked (not a regular file); remove it, or ask its owner to")

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self.path.lstat())
        except FileNotFoundError:
            return False

    def release(self, remove: bool = False) -> None:
        """Release the lock. With `remove`, allowed for exclusive holders only, also delete its file."""
        if self._file is not None:
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def touch(self) -> None:
        """Set the file's modification time to now."""
        os.utime(self.path)

    def note(self, text: str) -> None:
        """Write a note for waiting processes."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text.encode(), 0)

    def read_note(self) -> str:
        """Return the holder's note, or an empty string."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


class _NoteHandler(logging.Handler):
    """Writes the latest log message of a lock's holder into the lock's note."""

    def __init__(self, lock: Lock, who: str) -> None:
        super().__init__(logging.INFO)
        self.held, self.who = lock, who

    def emit(self, record: logging.LogRecord) -> None:
        self.held.note(f"{self.who}; {record.getMessage()}")


@contextmanager
def exclusive_lock(path: Path, doing: str) -> Iterator[None]:
    """Run the block in one process of this machine at a time. Other processes wait and log the holder's note.

    Args:
        path: Lock file.
        doing: Current activity, such as `fetching base-models/owner/name`.
    """
    lock = Lock(path)
    began = logged = time.monotonic()
    while not lock.acquire(blocking=False):
        if time.monotonic() - logged >= (LOG_INTERVAL_SECONDS if logged > began else 0.5):
            logged = time.monotonic()
            logger.info("Waiting for %s", lock.read_note() or f"the lock of another process ({doing})")
        time.sleep(POLL_SECONDS)
    who = f"the lock held by PID {os.getpid()} ({doing}, since {datetime.now():%H:%M:%S})"
    lock.note(who)
    handler, package = _NoteHandler(lock, who), logging.getLogger("finetune_assets")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        lock.release(remove=True)
