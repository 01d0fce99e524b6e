"""Objects as files below one folder, which may be shared with other users.

No link below the folder is ever followed: each path is opened component by component, relative to the open parent.
Other users may replace a file or folder by a link at any time, so that a check before the access would not suffice.
"""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from finetune_assets.store import modes
from finetune_assets.store.errors import StoreError, UnreadableObject

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Without O_NONBLOCK, a named pipe in place of a file would block the reader."""
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
STAGED = re.compile(r"#\d+$")
"""End of the names of files that are still being written. obstore, which wrote earlier stores, named them so too."""
DEEPEST = 64
"""Folders below folders that a listing enters; an artifact has five, and the folders of an import."""
TRIES = 10
"""Attempts to create a file whose folder another process removes as empty."""
FULL = "no space left; free some space, or raise the quota"
ADVICE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: f"File too large: {FULL}",
    errno.EACCES: "permission denied; check the owner and mode, or correct FINETUNE_STORE",
    errno.EPERM: "permission denied; check the owner and mode, or correct FINETUNE_STORE",
    errno.EROFS: "the file system is read-only",
}
LINK = "refusing to follow a symbolic link; remove it"


@dataclass(frozen=True)
class FileInfo:
    """A file in a listing.

    Attributes:
        key: Path relative to the folder, with forward slashes.
        size: Size in bytes.
        modified: Time of the last write, in seconds since 1970.
    """

    key: str
    size: int
    modified: float


class Folder:
    """A folder of objects.

    Args:
        url: URL of the folder, for error messages.
        path: The folder, created at the first use. It may itself be a link, or below one.
    """

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path = url, path

    def open(self, key: str) -> BinaryIO:
        """Open an object for reading.

        Raises:
            FileNotFoundError: If the object does not exist.
            UnreadableObject: If it is a link or not a regular file, is below a link, or access is denied.
        """
        with self._explained(key), self._parent(key) as (parent, name):
            self._refuse_link(parent, name, key)
            file = os.open(name, FILE, dir_fd=parent)
            kind = os.fstat(file).st_mode
            if not stat.S_ISREG(kind):
                os.close(file)
                if stat.S_ISDIR(kind):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key)
                raise UnreadableObject(f"{self.url}/{key}: not a regular file; remove it")
            return os.fdopen(file, "rb", buffering=0)

    def write(self, key: str, chunks: Iterable[bytes], replace: bool = True) -> bool:
        """Write an object, which becomes visible only when it is complete.

        Args:
            key: Key of the object.
            chunks: The content; errors while it is iterated pass through.
            replace: Replace an existing object. A link is replaced, not followed.

        Returns:
            False if the object exists and `replace` is False.
        """
        if STAGED.search(key):
            raise StoreError(f"{self.url}/{key}: file names must not end in '#' and a number; rename the file")
        with self._explained(key):
            parent, name, staged, file = self._stage(key)
            try:
                with os.fdopen(file, "wb") as out:  # buffered: a raw write may write fewer bytes on a full disk
                    for chunk in _outside(chunks):
                        out.write(chunk)
                if replace:
                    os.replace(staged, name, src_dir_fd=parent, dst_dir_fd=parent)
                else:
                    os.link(staged, name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
            except FileExistsError:
                return False
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(staged, dir_fd=parent)
                os.close(parent)
            return True

    def delete(self, keys: list[str]) -> None:
        """Delete objects and the folders that are empty then; missing objects are ignored."""
        for key in keys:
            with suppress(FileNotFoundError), self._explained(key), self._parent(key) as (parent, name):
                os.unlink(name, dir_fd=parent)
        folders = {"/".join(parts[:i]) for parts in (key.split("/") for key in keys) for i in range(1, len(parts))}
        for folder in sorted(folders, key=len, reverse=True):
            with suppress(OSError, StoreError), self._parent(folder) as (parent, name):
                os.rmdir(name, dir_fd=parent)

    def listing(self, prefix: str, skipped: dict[str, str], staged: bool = False) -> Iterator[FileInfo]:
        """Yield the regular files below a prefix of whole path segments.

        Args:
            prefix: Key prefix; empty for all.
            skipped: Receives what is neither listed nor entered, such as links: the reason by key.
            staged: Yield the files that are still being written instead of complete ones.
        """
        prefix = prefix.strip("/")
        try:
            with self._explained(prefix), self._parent(f"{prefix}/files".lstrip("/")) as (folder, _):
                opened = os.dup(folder)
        except FileNotFoundError:
            return
        except UnreadableObject as e:
            skipped[prefix] = str(e)
            return
        with self._explained(prefix):
            yield from self._walk(opened, f"{prefix}/" if prefix else "", skipped, staged)

    def _walk(self, folder: int, prefix: str, skipped: dict[str, str], staged: bool) -> Iterator[FileInfo]:
        """Yield the files below an open folder, depth first. Closes the folder."""
        opened = [(folder, prefix, self._entries(folder))]
        try:
            while opened:
                folder, prefix, entries = opened[-1]
                entry = next(entries, None)
                if entry is None:
                    os.close(opened.pop()[0])
                    continue
                key = f"{prefix}{entry.name}"
                try:
                    if entry.is_symlink():
                        skipped[key] = f"{self.url}/{key}: {LINK}"
                    elif entry.is_dir(follow_symlinks=False):
                        if len(opened) >= DEEPEST:
                            skipped[key] = f"{self.url}/{key}: more than {DEEPEST} folders deep; remove it"
                            continue
                        child = os.open(entry.name, FOLDER, dir_fd=folder)
                        opened.append((child, f"{key}/", self._entries(child)))
                    elif not entry.is_file(follow_symlinks=False):
                        skipped[key] = f"{self.url}/{key}: not a regular file; remove it"
                    elif bool(STAGED.search(entry.name)) == staged:
                        status = entry.stat(follow_symlinks=False)
                        yield FileInfo(key, status.st_size, status.st_mtime)
                except FileNotFoundError:
                    continue  # deleted in the meantime
                except OSError as e:
                    skipped[key] = f"{self.url}/{key}: {ADVICE.get(e.errno or 0) or e.strerror or e}"
        finally:
            for folder, _, _ in opened:
                os.close(folder)

    @staticmethod
    def _entries(folder: int) -> Iterator[os.DirEntry[str]]:
        with os.scandir(folder) as entries:
            yield from entries

    def _stage(self, key: str) -> tuple[int, str, str, int]:
        """Create a file beside an object; return its open folder, the object's name, the file's name, and the file."""
        for left in reversed(range(TRIES)):
            try:
                with self._parent(key, create=True) as (parent, name):
                    staged = f"{name[:60]}#{secrets.randbelow(10**12)}"
                    file = os.open(staged, NEW_FILE, modes.file_mode(), dir_fd=parent)
                    os.fchmod(file, modes.file_mode())
                    return os.dup(parent), name, staged, file
            except FileNotFoundError:  # the folder was empty, and another process removed it
                if left == 0:
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def _parent(self, key: str, create: bool = False) -> Iterator[tuple[int, str]]:
        """Open the folder of an object without following a link; yield it and the object's name in it."""
        parts = key.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise StoreError(f"{self.url}/{key}: invalid key; it must be a plain relative path")
        folder = self._root()
        try:
            for i, part in enumerate(parts[:-1]):
                child = self._child(folder, part, "/".join(parts[: i + 1]), create)
                os.close(folder)
                folder = child
            yield folder, parts[-1]
        finally:
            os.close(folder)

    def _child(self, folder: int, name: str, key: str, create: bool) -> int:
        try:
            return os.open(name, FOLDER, dir_fd=folder)
        except FileNotFoundError:
            if not create:
                raise
        except OSError as e:
            if e.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            self._refuse_link(folder, name, key)
            if create:
                raise StoreError(f"{self.url}/{key}: a file, where a folder is needed; remove it") from e
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key) from e
        with suppress(FileExistsError):
            os.mkdir(name, modes.folder_mode(), dir_fd=folder)
            child = os.open(name, FOLDER, dir_fd=folder)
            modes.set_folder_mode(child)
            return child
        return self._child(folder, name, key, create=False)

    def _root(self) -> int:
        try:
            try:
                return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                modes.make_folders(self.path)
                return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise StoreError(f"FINETUNE_STORE: cannot use '{self.url}' as a folder: {e.strerror or e}") from e

    def _refuse_link(self, folder: int, name: str, key: str) -> None:
        with suppress(FileNotFoundError):
            if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise UnreadableObject(f"{self.url}/{key}: {LINK}")

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Convert errors of the file system into a one-line `StoreError` with advice."""
        try:
            yield
        except FileNotFoundError:
            raise
        except _Outside as e:
            raise e.error from None
        except OSError as e:
            where, code = f"{self.url}/{key}".rstrip("/"), errno.errorcode.get(e.errno or 0, type(e).__name__)
            error = UnreadableObject if e.errno in (errno.EACCES, errno.ENXIO, errno.ELOOP) else StoreError
            raise error(f"{where}: {ADVICE.get(e.errno or 0) or e.strerror or e} ({code})") from e


class _Outside(Exception):
    """An error of the content's source, which is no error of the store."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _outside(chunks: Iterable[bytes]) -> Iterator[bytes]:
    try:
        yield from chunks
    except Exception as e:
        raise _Outside(e) from e
