"""Hashes of file contents."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Return the sha256 of a file's content as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
