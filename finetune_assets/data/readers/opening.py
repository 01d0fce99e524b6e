"""Opens files of rows: decompresses them, and refuses what their first bytes show to be something else."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from finetune_assets.data.errors import DataError

CHUNK = 1 << 18
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LFS_POINTER = b"version https://git-lfs"
LFS_PROBLEM = "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, then copy the file again"
NOT_TEXT = {
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed (gzip); rename it to end in .gz, as in rows.jsonl.gz",
    b"\x28\xb5\x2f\xfd": "compressed (Zstandard); rename it to end in .zst, as in rows.jsonl.zst",
    b"BZh": "compressed (bzip2); unpack it, or compress it with gzip or Zstandard",
    b"\xfd7zXZ": "compressed (xz); unpack it, or compress it with gzip or Zstandard",
    b"PK": "a zip archive or spreadsheet; unpack it, or export it as CSV",
    b"PAR1": "a Parquet file; rename it to end in .parquet",
    b"ARROW1": "an Arrow file; rename it to end in .arrow",
    b"<!DOCTYPE": "an HTML page; download the file itself",
    b"<html": "an HTML page; download the file itself",
    LFS_POINTER: LFS_PROBLEM,
}
"""First bytes of files that are not text of rows, despite the file extension."""


FREE_BYTES, EXPANSION = 16 << 20, 200
"""Decompressed size up to which a file may have any ratio, and the maximum ratio beyond. Rows compress to a tenth."""


class _Bounded(io.RawIOBase):
    """A decompressed file that ends with an error where a few bytes expand to gigabytes.

    Args:
        path: The file.
        decompressed: Its decompressed content.
        consumed: Number of compressed bytes read so far.
    """

    def __init__(self, path: Path, decompressed: Any, consumed: Callable[[], int]) -> None:
        self.path, self.decompressed, self.consumed, self.count = path, decompressed, consumed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = int(self.decompressed.readinto(buffer))
        self.count += size
        if self.count > FREE_BYTES and self.count > EXPANSION * self.consumed():
            raise DataError(
                f"{self.path}: decompresses to more than {EXPANSION} times its size, so the whole file is refused; "
                "decompress it first if this is intended"
            )
        return size

    def close(self) -> None:
        self.decompressed.close()
        super().close()


def _open_gzip(path: Path) -> BinaryIO:
    file = gzip.GzipFile(path)
    return io.BufferedReader(_Bounded(path, file, file.fileobj.tell), CHUNK)  # type: ignore[union-attr]


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow as pa

    source = pa.OSFile(str(path))
    return io.BufferedReader(_Bounded(path, pa.CompressedInputStream(source, "zstd"), source.tell), CHUNK)


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": _open_gzip,
    ".zst": _open_zstd,
}
"""How a compressed file is opened, by file extension. Python's readers of .bz2 and .xz ignore what follows a damaged or
foreign byte after the first stream, so rows would be lost."""


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed."""
    opener = COMPRESSED.get(path.suffix.lower())
    return opener(path) if opener else open(path, "rb")


def open_text(path: Path) -> TextIO:
    """Open a file for reading, decompressed, without translating line ends; bytes that are not UTF-8 are kept."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_start(path: Path) -> bytes:
    """Read the first bytes of a text file.

    Raises:
        DataError: if they show that the file is not UTF-8 text of rows.
    """
    with open_bytes(path) as file:
        start = file.read(4096)
    for mark, problem in NOT_TEXT.items():
        if start.startswith(mark):
            raise DataError(f"{path}: this is {problem}")
    if b"\0" in start[:4]:
        raise DataError(f"{path}: this is binary, or text in UTF-16 or UTF-32; save it as UTF-8")
    return start
