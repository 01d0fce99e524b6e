"""Folders to publish, and what is in one."""

import os
from pathlib import Path

SMALL = 320 << 10
"""Bytes of the large file in a folder where its size does not matter."""
SEVERAL_PARTS = 20 << 20
"""Bytes of a file that is uploaded in several parts."""


def make_folder(folder: Path, big: int = SMALL) -> Path:
    """A folder with a large file, one below a folder, and an empty one."""
    (folder / "sub").mkdir(parents=True)
    (folder / "big.bin").write_bytes(os.urandom(big))
    (folder / "sub" / "small.txt").write_text("small")
    (folder / "empty").touch()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's content by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
