"""What a file's content is known by."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Of a file's content, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
