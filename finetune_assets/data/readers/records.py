"""What a reader yields: the rows of a file, each with its line, and those that cannot be read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finetune_assets.data.errors import DataError

MAX_ROW_BYTES = 16 << 20
"""Maximum size of a row; far beyond any context window, far below what would exhaust the memory."""
MAX_COLUMNS = 10_000
"""Maximum number of columns of a table, and of keys of a row."""
MAX_BLANK_LINES = 100_000
"""Maximum number of blank lines between two rows."""
MAX_SKIPPED_BYTES = 256 << 20
"""Size of a row up to which only the row is quarantined; a file with a longer one is refused."""
KEPT_CHARACTERS = 100_000
"""Maximum number of characters of a bad row's text kept in the quarantine."""


@dataclass(frozen=True)
class SourceFile:
    """A file of rows.

    Attributes:
        name: Relative to its source, the same on every machine.
        path: Its location on this machine.
    """

    name: str
    path: Path


class SourceRecord(NamedTuple):
    """One row as read from a file.

    Attributes:
        line: Line of the file on which the row begins; in Parquet and Arrow, number of the row, from 1.
        row: The parsed row; a dictionary if it is valid.
        text: Source text of the row, if available.
    """

    line: int
    row: Any
    text: bytes | None = None


class Unreadable(NamedTuple):
    """A row that cannot be read.

    Attributes:
        line: As in `SourceRecord`.
        reason: Reason why the row cannot be read.
        text: Source text of the row, at most `KEPT_CHARACTERS`.
    """

    line: int
    reason: str
    text: str


Records = Iterator[SourceRecord | Unreadable]


def kept(text: bytes | str) -> str:
    """The part of a bad row's text to keep; bytes that are not UTF-8 are escaped."""
    part = text[:KEPT_CHARACTERS]
    return (
        part.decode(errors="backslashreplace")
        if isinstance(part, bytes)
        else part.encode(errors="backslashreplace").decode()
    )


def count_blank(blank: int, path: Path, line: int) -> int:
    """Number of blank lines in a row, with one more.

    Raises:
        DataError: if there are more than `MAX_BLANK_LINES`, which a small compressed file may have without end.
    """
    if blank >= MAX_BLANK_LINES:
        raise DataError(f"{path}:{line}: more than {MAX_BLANK_LINES:,} blank lines; remove them")
    return blank + 1


def too_long(size: int) -> str:
    """Reason why a row of this size, in bytes, is not read."""
    return f"row of {size:,} bytes exceeds the maximum of {MAX_ROW_BYTES:,}; split or remove it"
