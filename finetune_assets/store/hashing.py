"""Hashes of file contents."""

import hashlib
from pathlib import Path

from finetune_assets.store.errors import StoreError


def sha256(path: Path) -> str:
    """Return the sha256 of a file's content as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_files(folder: Path) -> dict[str, Path]:
    """Return every file below a folder, by relative path.

    Raises:
        StoreError: If a file is a symbolic link to outside the folder.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in files.values():
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise StoreError(f"{path}: symbolic link to a file outside {folder}; replace it with the file")
    return files


def folder_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by relative path."""
    return {name: sha256(path) for name, path in folder_files(folder).items()}
