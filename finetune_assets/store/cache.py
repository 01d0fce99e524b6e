"""Node-local cache of artifact files, verified when they were fetched and shared by all processes on the machine.

The cache has a size limit. The least recently used entries are evicted first; entries in use are never evicted.
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
from finetune_assets.store import modes
from finetune_assets.store.errors import StoreError
from finetune_assets.store.hashing import sha256
from finetune_assets.store.locks import Lock, exclusive_lock
from finetune_assets.store.manifest import FileEntry, Manifest, ManifestError, is_plain, parse
from finetune_assets.store.results import Results

FREE_BYTES = 500_000_000
"""Disk space that the cache leaves free, in bytes."""
RESERVED = "reserved"
logger = logging.getLogger(__name__)

_HELD: dict[Path, Lock] = {}
"""Locks on the entries that this process uses, held until it exits."""


@dataclass(frozen=True)
class Entry:
    """Location of one attempt at an artifact in the cache.

    Attributes:
        name: Path of the artifact in the store as one name; see `flat`.
        attempt: Name of the attempt's folder, from the manifest.
        root: Folder of the cache.
    """

    name: str
    attempt: str
    root: Path

    @property
    def label(self) -> str:
        return f"{self.name}--{self.attempt}"

    @property
    def folder(self) -> Path:
        """Folder that contains only the artifact's files."""
        return self.root / "artifacts" / self.name / self.attempt

    @property
    def manifest_file(self) -> Path:
        return self.folder.with_name(f"{self.attempt}.json")

    @property
    def partial(self) -> Path:
        """Folder of files that are not verified yet."""
        return self.root / "partial" / self.label

    @property
    def use(self) -> Lock:
        """Lock held in shared mode by every process that uses the files."""
        return Lock(self.root / "locks" / f"{self.label}.use")

    @property
    def fill(self) -> Path:
        """Lock file of the process that fetches the entry."""
        return self.root / "locks" / f"{self.label}.fill"

    def manifest(self) -> Manifest | None:
        """Return the manifest that the files were verified against, or None."""
        try:
            return parse(self.manifest_file.read_bytes(), str(self.manifest_file))
        except (FileNotFoundError, ManifestError):
            return None

    def hold(self) -> None:
        """Protect the files from eviction while this process lives, and mark them as most recently used."""
        if self.folder not in _HELD:
            lock = self.use
            lock.acquire(shared=True)
            _HELD[self.folder] = lock
        _HELD[self.folder].touch()

    def serves(self, manifest: Manifest, only: Callable[[str], bool]) -> bool:
        """Whether the selected files are all cached, without files that are not in the manifest."""
        wanted = [entry for entry in manifest.files if only(entry.path)]
        return not self.missing(manifest, wanted) and not self.unexpected(manifest)

    def missing(self, manifest: Manifest, wanted: Iterable[FileEntry]) -> list[FileEntry]:
        """Return the wanted files that are not cached or have changed since they were verified."""
        return [entry for entry in wanted if not self._is_whole(entry, manifest)]

    def _is_whole(self, entry: FileEntry, manifest: Manifest) -> bool:
        path = self.folder / entry.path
        if path.is_symlink() or not path.is_file():
            return False
        stat = path.stat()
        return stat.st_size == entry.size and stat.st_mtime_ns == stamp(manifest)

    def unexpected(self, manifest: Manifest) -> list[Path]:
        """Return the symbolic links and the files that are not in the manifest."""
        expected = {self.folder / entry.path for entry in manifest.files}
        return [
            path for path in self.folder.rglob("*") if path.is_symlink() or (path.is_file() and path not in expected)
        ]

    def damaged(self) -> list[str]:
        """Read every cached file; return the paths of files that differ from, or are not in, the manifest."""
        manifest = self.manifest()
        if manifest is None:
            return [self.manifest_file.name]
        here = (entry for entry in manifest.files if (self.folder / entry.path).is_file())
        bad = [entry.path for entry in here if sha256(self.folder / entry.path) != entry.sha256]
        return bad + [path.relative_to(self.folder).as_posix() for path in self.unexpected(manifest)]

    def size(self) -> int:
        """Return the size in bytes, including the bytes that a fetch in progress has reserved."""
        here = sum(path.lstat().st_size for path in self.folder.rglob("*") if not path.is_dir())
        try:
            return max(here, int((self.partial / RESERVED).read_text(encoding="utf-8") or 0))
        except (FileNotFoundError, ValueError):
            return here

    def accept(self, path: Path, entry: FileEntry, manifest: Manifest) -> None:
        """Move a verified file into the entry and set its modification time, which a later write would change.

        Raises:
            StoreError: If the target folder is a symbolic link to outside the entry.
        """
        target = self.folder / entry.path
        modes.make_folders(target.parent)
        if not target.parent.resolve().is_relative_to(self.folder.resolve()):
            raise StoreError(f"{target}: refusing to write, its folder is a symbolic link; delete {self.folder}")
        os.utime(path, ns=(stamp(manifest), stamp(manifest)))
        path.chmod(modes.cached_file_mode())
        path.replace(target)

    def remove(self) -> bool:
        """Delete the entry unless a process uses it; return whether it was deleted."""
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
    """State of a cache entry.

    Attributes:
        entry: The entry.
        size: Size in bytes.
        used: Time of last use.
        in_use: Whether a process uses the entry now.
    """

    entry: Entry
    size: int
    used: datetime
    in_use: bool


class NodeCache:
    """Cache of artifacts on this machine's local disk.

    Args:
        root: Folder of the cache.
        limit: Maximum size of the cached artifacts in bytes; None for no limit.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.root, self.limit = root, limit
        if root.is_dir():
            modes.restrict(root)

    def entry(self, prefix: str, attempt: str) -> Entry:
        """Return the entry for an attempt at an artifact, cached or not.

        Raises:
            StoreError: If the attempt is not a plain folder name.
        """
        if not is_plain(attempt) or "/" in attempt:
            raise StoreError(f"{prefix}: '{attempt}' is not the name of a folder in the store")
        return Entry(flat(prefix), attempt, self.root)

    @contextmanager
    def filling(self, entry: Entry, doing: str) -> Iterator[None]:
        """Hold the exclusive right to fetch into an entry. Partial files of a killed process are removed."""
        with exclusive_lock(entry.fill, doing):
            shutil.rmtree(entry.partial, ignore_errors=True)
            modes.make_folders(entry.partial)
            try:
                yield
            finally:
                shutil.rmtree(entry.partial, ignore_errors=True)

    def make_room(self, entry: Entry, total: int, coming: int) -> None:
        """Evict entries until `coming` more bytes fit, and reserve the space.

        Args:
            entry: Entry being fetched; this process holds it already, so it is not evicted.
            total: Size of the complete entry in bytes.
            coming: Bytes of `total` that are still to be fetched.

        Raises:
            StoreError: If the bytes cannot fit.
        """
        with self._room():
            self._sweep()
            others = [cached for cached in self.entries() if cached.entry != entry]
            used = sum(cached.size for cached in others)
            free = shutil.disk_usage(self.root).free - FREE_BYTES
            for cached in sorted(others, key=lambda cached: cached.used):
                if (self.limit is None or used + total <= self.limit) and coming <= free:
                    break
                if not cached.in_use and cached.entry.remove():
                    logger.info("Evicted %s (%s) from cache %s", cached.entry.name, gigabytes(cached.size), self.root)
                    used, free = used - cached.size, free + cached.size
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
            modes.write_file(entry.partial / RESERVED, str(total).encode())
            modes.make_folders(entry.folder)  # other processes count the entry from now on

    def entries(self) -> list[Cached]:
        """Return the state of every cache entry."""
        entries = []
        for folder in sorted(self.root.glob("artifacts/*/*/")):
            entry = Entry(folder.parent.name, folder.name, self.root)
            lock = entry.use
            free = lock.acquire(blocking=False)
            used = datetime.fromtimestamp(lock.path.stat().st_mtime if lock.path.exists() else 0)
            lock.release()
            entries.append(Cached(entry, entry.size(), used, not free))
        return entries

    @property
    def simulations(self) -> Path:
        """Folder of simulation results, one small file each."""
        return self.root / "simulations"

    @property
    def derived(self) -> Results:
        """Results that are derived from artifacts, such as plots, and are part of none."""
        return Results(self.root / "derived")

    def scratch(self, fingerprint: str) -> Path:
        """Return the folder that a failed job leaves for the next attempt at the same fingerprint."""
        return self.root / "scratch" / fingerprint

    def old_scratch(self, before: datetime, dry_run: bool) -> list[Path]:
        """Find scratch folders not written to since `before`; remove them unless `dry_run`."""
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
        """Create a temporary folder, removed on exit. If the process is killed, the next workspace removes it."""
        self._sweep()
        name = f"{prefix}-{uuid.uuid4().hex[:12]}"
        folder, lock = self.root / "work" / name, Lock(self.root / "locks" / f"{name}.work")
        lock.acquire()
        modes.make_folders(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release(remove=True)

    @contextmanager
    def exclusive(self, name: str, doing: str) -> Iterator[None]:
        """Run the block in one process of this machine at a time; see `locks.alone`."""
        with exclusive_lock(self.root / "locks" / f"{flat(name)}.alone", doing):
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
        """Remove the partial files and workspaces of killed processes."""
        for kind, ending in (("partial", "fill"), ("work", "work")):
            for folder in self.root.glob(f"{kind}/*/"):
                lock = Lock(self.root / "locks" / f"{folder.name}.{ending}")
                if lock.acquire(blocking=False):
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.release(remove=True)


def stamp(manifest: Manifest) -> int:
    """Return the modification time of verified files (nanoseconds since 1970); a later write changes it."""
    return int(datetime.fromisoformat(manifest.created).timestamp()) * 10**9


def flat(prefix: str) -> str:
    """Return a path of the store as one name that no other path has, with `--` in place of `/`.

    A path that contains `--` itself, or a `-` beside a `/`, has each of its hyphens encoded.
    """
    if any(part in f"/{prefix}/" for part in ("--", "-/", "/-", "%")):
        prefix = prefix.replace("%", "%25").replace("-", "%2D")
    return prefix.replace("/", "--")


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
