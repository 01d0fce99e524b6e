"""The node-local cache: files of artifacts that were verified when they came, shared by all processes of a machine.

It is bounded: what was used least recently goes first, and never what some process is using.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from finetune_assets.progress import gigabytes
from finetune_assets.store.errors import StoreError
from finetune_assets.store.hashing import sha256
from finetune_assets.store.locks import Lock, alone
from finetune_assets.store.manifest import FileEntry, Manifest, ManifestError, parse

FREE_BYTES = 500_000_000
"""What is left free on the disk."""
RESERVED = "reserved"
logger = logging.getLogger(__name__)

_HELD: dict[Path, Lock] = {}
"""What this process uses, until it ends."""


@dataclass(frozen=True)
class Entry:
    """Where one attempt at one artifact lies in the cache.

    Attributes:
        name: Its store path in one word.
        attempt: The manifest's folder.
        root: The cache.
    """

    name: str
    attempt: str
    root: Path

    @property
    def label(self) -> str:
        return f"{self.name}--{self.attempt}"

    @property
    def folder(self) -> Path:
        """The artifact's files, and nothing else."""
        return self.root / "artifacts" / self.name / self.attempt

    @property
    def manifest_file(self) -> Path:
        return self.folder.with_name(f"{self.attempt}.json")

    @property
    def partial(self) -> Path:
        """Files that are not verified yet."""
        return self.root / "partial" / self.label

    @property
    def use(self) -> Lock:
        """Held, shared, by every process that uses the files."""
        return Lock(self.root / "locks" / f"{self.label}.use")

    @property
    def fill(self) -> Path:
        """Lock file of the one process that fetches."""
        return self.root / "locks" / f"{self.label}.fill"

    def manifest(self) -> Manifest | None:
        """The manifest that the files were verified against, if there is one."""
        try:
            return parse(self.manifest_file.read_bytes(), str(self.manifest_file))
        except (FileNotFoundError, ManifestError):
            return None

    def hold(self) -> None:
        """Keep the files from being evicted while this process lives, and make them the most recently used."""
        if self.folder not in _HELD:
            lock = self.use
            lock.acquire(shared=True)
            _HELD[self.folder] = lock
        _HELD[self.folder].touch()

    def serves(self, manifest: Manifest, only: Callable[[str], bool]) -> bool:
        """Whether all that is wanted is here, and nothing that the manifest does not name."""
        wanted = [entry for entry in manifest.files if only(entry.path)]
        return not self.missing(manifest, wanted) and not self.unexpected(manifest)

    def missing(self, manifest: Manifest, wanted: Iterable[FileEntry]) -> list[FileEntry]:
        """Of the files that are wanted, those that are not here as they were when they were verified."""
        return [entry for entry in wanted if not self._is_whole(entry, manifest)]

    def _is_whole(self, entry: FileEntry, manifest: Manifest) -> bool:
        path = self.folder / entry.path
        if path.is_symlink() or not path.is_file():
            return False
        found = path.stat()
        return found.st_size == entry.size and found.st_mtime_ns == stamp(manifest)

    def unexpected(self, manifest: Manifest) -> list[Path]:
        """What lies among the files and is not the manifest's: a link, or a file that somebody has put there."""
        expected = {self.folder / entry.path for entry in manifest.files}
        return [
            path for path in self.folder.rglob("*") if path.is_symlink() or (path.is_file() and path not in expected)
        ]

    def damaged(self) -> list[str]:
        """Read every file that is here; the paths of those that are not what the manifest says."""
        manifest = self.manifest()
        if manifest is None:
            return [self.manifest_file.name]
        here = (entry for entry in manifest.files if (self.folder / entry.path).is_file())
        bad = [entry.path for entry in here if sha256(self.folder / entry.path) != entry.sha256]
        return bad + [path.relative_to(self.folder).as_posix() for path in self.unexpected(manifest)]

    def size(self) -> int:
        """Bytes, with those that a fetch under way has yet to bring."""
        here = sum(path.lstat().st_size for path in self.folder.rglob("*") if not path.is_dir())
        try:
            return max(here, int((self.partial / RESERVED).read_text(encoding="utf-8") or 0))
        except (FileNotFoundError, ValueError):
            return here

    def accept(self, path: Path, entry: FileEntry, manifest: Manifest) -> None:
        """Take a file that was verified. From now on its time says that nobody has written to it."""
        target = self.folder / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(self.folder.resolve()):
            raise StoreError(f"{target}: refused, its folder is a link; delete {self.folder}")
        os.utime(path, ns=(stamp(manifest), stamp(manifest)))
        path.chmod(0o444)
        path.replace(target)

    def remove(self) -> bool:
        """Delete the files unless a process uses them."""
        lock = self.use
        if not lock.acquire(blocking=False):
            return False
        try:
            self.manifest_file.unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            _remove_if_empty(self.folder.parent)
        finally:
            lock.release(remove=True)
        return True


@dataclass(frozen=True)
class Cached:
    """What the cache tells of an entry.

    Attributes:
        entry: The entry.
        size: Bytes.
        used: When it was used last.
        in_use: Whether some process uses it now.
    """

    entry: Entry
    size: int
    used: datetime
    in_use: bool


class NodeCache:
    """A folder on this machine's own disk.

    Args:
        root: The folder.
        limit: Most bytes of artifacts that it keeps; None for no limit.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.root, self.limit = root, limit

    def entry(self, prefix: str, attempt: str) -> Entry:
        """Where an artifact's attempt lies, whether or not it is here."""
        return Entry(prefix.replace("/", "--"), attempt, self.root)

    @contextmanager
    def filling(self, entry: Entry, doing: str) -> Iterator[None]:
        """Be the one process that fetches into an entry; what a process that was killed left half is removed."""
        with alone(entry.fill, doing):
            shutil.rmtree(entry.partial, ignore_errors=True)
            entry.partial.mkdir(parents=True)
            try:
                yield
            finally:
                shutil.rmtree(entry.partial, ignore_errors=True)

    def make_room(self, entry: Entry, total: int, coming: int) -> None:
        """Evict until `coming` more bytes fit, and reserve them.

        Args:
            entry: What is being fetched; it is held already, so it stays.
            total: Its bytes once all is here.
            coming: Of these, the bytes that are still to come.

        Raises:
            StoreError: if they cannot fit, saying what would help.
        """
        with self._room():
            self._sweep()
            cached = [one for one in self.entries() if one.entry != entry]
            used = sum(one.size for one in cached)
            free = shutil.disk_usage(self.root).free - FREE_BYTES
            for one in sorted(cached, key=lambda one: one.used):
                if (self.limit is None or used + total <= self.limit) and coming <= free:
                    break
                if not one.in_use and one.entry.remove():
                    logger.info("removed %s (%s) from %s to make room", one.entry.name, gigabytes(one.size), self.root)
                    used, free = used - one.size, free + one.size
            if self.limit is not None and used + total > self.limit:
                rest = f", and running jobs use {gigabytes(used)}" if used else ""
                raise StoreError(
                    f"FINETUNE_CACHE_LIMIT is too small: {gigabytes(self.limit)}, artifact {entry.name} needs "
                    f"{gigabytes(total)}{rest}"
                )
            if coming > free:
                raise StoreError(
                    f"{self.root}: not enough disk space; {entry.name} needs {gigabytes(coming)}, "
                    f"{gigabytes(max(free, 0))} free. Free some, or set FINETUNE_CACHE to a folder on a larger disk"
                )
            (entry.partial / RESERVED).write_text(str(total), encoding="utf-8")
            entry.folder.mkdir(parents=True, exist_ok=True)  # from here on others count it

    def entries(self) -> list[Cached]:
        """Everything that is kept."""
        found = []
        for folder in sorted(self.root.glob("artifacts/*/*/")):
            entry = Entry(folder.parent.name, folder.name, self.root)
            lock = entry.use
            free = lock.acquire(blocking=False)
            used = datetime.fromtimestamp(lock.path.stat().st_mtime if lock.path.exists() else 0)
            lock.release()
            found.append(Cached(entry, entry.size(), used, not free))
        return found

    @property
    def simulations(self) -> Path:
        """Where results of simulations are kept, a small file each."""
        return self.root / "simulations"

    def scratch(self, fingerprint: str) -> Path:
        """A folder that outlives a job that fails, for the next attempt at the same fingerprint."""
        return self.root / "scratch" / fingerprint

    def old_scratch(self, before: datetime, dry_run: bool) -> list[Path]:
        """Scratch folders that no job has written to since a moment; removed unless `dry_run`."""
        old = []
        for folder in self.root.glob("scratch/*/"):
            touched = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            lock = Lock(self.root / "locks" / f"job-{folder.name}.alone")
            if touched < before.timestamp() and lock.acquire(blocking=False):
                if not dry_run:
                    shutil.rmtree(folder, ignore_errors=True)
                lock.release(remove=True)
                old.append(folder)
        return old

    @contextmanager
    def workspace(self, prefix: str) -> Iterator[Path]:
        """A folder that goes when the context ends; if the process dies first, with the next one that is made."""
        self._sweep()
        name = f"{prefix}-{uuid.uuid4().hex[:12]}"
        folder, lock = self.root / "work" / name, Lock(self.root / "locks" / f"{name}.work")
        lock.acquire()
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release(remove=True)

    @contextmanager
    def alone(self, name: str, doing: str) -> Iterator[None]:
        """Let one process of this machine at a time do something."""
        with alone(self.root / "locks" / f"{name.replace('/', '--')}.alone", doing):
            yield

    @contextmanager
    def _room(self) -> Iterator[None]:
        lock = Lock(self.root / "locks" / "room")
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Remove what processes that were killed have left: half-fetched files, and workspaces."""
        for kind, ending in (("partial", "fill"), ("work", "work")):
            for folder in self.root.glob(f"{kind}/*/"):
                lock = Lock(self.root / "locks" / f"{folder.name}.{ending}")
                if lock.acquire(blocking=False):
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.release(remove=True)


def stamp(manifest: Manifest) -> int:
    """The time that verified files of an artifact bear (nanoseconds since 1970); writing to one changes it."""
    return int(datetime.fromisoformat(manifest.created).timestamp()) * 10**9


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
