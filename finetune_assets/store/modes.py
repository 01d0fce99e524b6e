"""Modes of the files and folders that this project creates: private, or shared with the user's group.

FINETUNE_GROUP_ACCESS: `1` gives the user's group read and write access to the folder store and the node cache (0770
    and 0660). By default both are private (0700 and 0600). Neither depends on the umask.
"""

import os
from pathlib import Path

from finetune_assets.store.errors import StoreError

VARIABLE = "FINETUNE_GROUP_ACCESS"
SPECIAL_BITS = 0o7000
"""Set-user-id, set-group-id and sticky bit. A folder inherits the second, so that new files have the group of it."""


def has_group_access() -> bool:
    """Whether the user's group may read and write.

    Raises:
        StoreError: If FINETUNE_GROUP_ACCESS is neither `1`, `0` nor empty.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise StoreError(f"{VARIABLE}: '{value}' is invalid; set 1 for access by the group, or 0 for private files")
    return value == "1"


def folder_mode() -> int:
    return 0o770 if has_group_access() else 0o700


def file_mode() -> int:
    return 0o660 if has_group_access() else 0o600


def cached_file_mode() -> int:
    """Mode of verified files, which must not change."""
    return 0o440 if has_group_access() else 0o400


def umask() -> int:
    """The umask that results in these modes, for files that libraries write."""
    return 0o777 & ~folder_mode()


def set_folder_mode(folder: int) -> None:
    """Set the mode of an open folder of this user, whatever the umask was when it was created."""
    inherited = os.fstat(folder).st_mode & SPECIAL_BITS
    os.fchmod(folder, inherited | folder_mode())


def make_folders(path: Path) -> None:
    """Create a folder and its missing parents."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folders(path.parent)
    try:
        path.mkdir(folder_mode())
    except FileExistsError:
        if not path.is_dir():
            raise
        return  # created by another process
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        set_folder_mode(folder)
    finally:
        os.close(folder)


def restrict(path: Path) -> None:
    """Remove others' access to a folder of this user that an earlier version created."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(folder)
        if status.st_uid == os.geteuid() and status.st_mode & 0o777 & ~folder_mode():
            set_folder_mode(folder)
    finally:
        os.close(folder)


def create_file(path: Path) -> int:
    """Create a file, replacing none, and return it open for writing.

    Raises:
        FileExistsError: If the path exists, even as a link to nothing.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file_mode())
    os.fchmod(file, file_mode())
    return file


def write_file(path: Path, content: bytes) -> None:
    """Write a small file, replacing an existing one."""
    path.unlink(missing_ok=True)
    with os.fdopen(create_file(path), "wb") as file:
        file.write(content)


def private(path: str, flags: int) -> int:
    """Opener for `open`: a new file has this project's mode."""
    return os.open(path, flags, file_mode())
