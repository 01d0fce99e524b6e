"""Reads the rows of a file one by one in bounded memory: JSON Lines, a JSON array, CSV, Parquet.

A row that cannot be read is returned as `Unreadable`, and reading continues after it. If the rows after it cannot be
separated any more, the whole file is refused, so that no row is lost silently.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TextIO

from finetune_assets.data.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROW_BYTES = 16 << 20
"""Maximum size of a row; far beyond any context window, far below what would exhaust the memory."""
KEPT_CHARACTERS = 100_000
"""Maximum number of characters of a bad row's text kept in the quarantine."""
CHUNK = 1 << 20
ROWS_PER_BATCH = 1_000
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOT_TEXT = {
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed (gzip); unpack it first",
    b"PK": "a zip archive or spreadsheet; unpack it, or export it as CSV",
    b"PAR1": "a Parquet file; rename it to end in .parquet",
}
"""First bytes of files that are not UTF-8 text, despite the file extension."""


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
        line: Line of the file on which the row begins; in Parquet, number of the row, from 1.
        row: The parsed row; a dictionary if it is valid.
        text: Source text of the row, if available.
    """

    line: int
    row: Any
    text: bytes | None = None


class Unreadable(NamedTuple):
    """A row that cannot be read.

    Attributes:
        line: As in `Record`.
        reason: Reason why the row cannot be read.
        text: Source text of the row, at most `KEPT_CHARACTERS`.
    """

    line: int
    reason: str
    text: str


Records = Iterator[SourceRecord | Unreadable]


def read_records(path: Path) -> Records:
    """Read all rows of a file; the file extension selects the format.

    Raises:
        DataError: naming file (and line), if the file as a whole cannot be read.
    """
    try:
        yield from READERS[path.suffix.lower()](path)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e


def kept(text: bytes | str) -> str:
    """The part of a bad row's text to keep; bytes that are not UTF-8 are escaped."""
    part = text[:KEPT_CHARACTERS]
    return (
        part.decode(errors="backslashreplace")
        if isinstance(part, bytes)
        else part.encode(errors="backslashreplace").decode()
    )


def _json(path: Path) -> Records:
    with open(path, "rb") as file:
        start = file.read(4096)
        _check_text(start, path)
        file.seek(0)
        begins = start.removeprefix(BYTE_ORDER_MARK).lstrip()
        if begins.partition(b"\n")[0].strip() == b"{":
            raise DataError(f"{path}: neither an array of rows, [{{...}}, {{...}}], nor one JSON object per line")
        if begins[:1] != b"[":
            yield from _json_lines(file, path)
            return
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as text:
        yield from _json_array(text, path)


def _check_text(start: bytes, path: Path) -> None:
    for mark, problem in NOT_TEXT.items():
        if start.startswith(mark):
            raise DataError(f"{path}: this is {problem}")


def _json_lines(file: BinaryIO, path: Path) -> Records:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            yield Unreadable(number, _too_long(len(line) + _skip_line(file, line)), kept(line))
        elif line.strip():
            yield _parsed(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, number)


def _skip_line(file: BinaryIO, line: bytes) -> int:
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(CHUNK)
        skipped += len(line)
    return skipped


def _too_long(size: int) -> str:
    return f"row of {size:,} bytes exceeds the maximum of {MAX_ROW_BYTES:,}; split or remove it"


def _parsed(line: bytes, number: int) -> SourceRecord | Unreadable:
    try:
        return SourceRecord(number, json.loads(line.rstrip()), line)
    except UnicodeDecodeError as e:
        reason = f"not UTF-8 at byte {e.start} of the line; save the file as UTF-8"
    except json.JSONDecodeError as e:
        reason = f"not JSON: {e.msg.removesuffix(' at')} at column {e.colno}; expected one JSON object per line"
    except (ValueError, RecursionError) as e:
        reason = f"cannot be read: {e}"
    return Unreadable(number, reason, kept(line))


def _json_array(file: TextIO, path: Path) -> Records:
    """Read the elements of a JSON array without loading all of it into memory."""
    array = _ArrayText(file, path)
    array.skip("[")
    while not array.at("]"):
        line = array.line
        yield SourceRecord(line, array.element())
        if not array.at("]"):
            array.skip(",")
            if array.at("]"):
                raise array.broken("no row after the comma")
    array.skip("]")
    if array.next():
        raise array.broken("more text after the array")


class _ArrayText:
    """A sliding window over the text of a JSON array."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.position, self.line, self.ended = "", 0, 1, False
        self.decoder = json.JSONDecoder()

    def next(self) -> str:
        """Skip white space and return the next character; empty at the end."""
        while True:
            self._move(WHITE_SPACE.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text) or not self._read():
                return self.text[self.position : self.position + 1]

    def at(self, character: str) -> bool:
        return self.next() == character

    def skip(self, character: str) -> None:
        if not self.at(character):
            raise self.broken(f"expected '{character}', found {self.next() or 'the end of the file'}")
        self._move(self.position + 1)

    def element(self) -> Any:
        """The element at the current position; reads more text until it is complete."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
                if end < len(self.text) or self.ended:  # otherwise a number might continue
                    self._move(end)
                    return value
            except (json.JSONDecodeError, RecursionError) as e:
                if self.ended:
                    raise self._at_error(e) from e
            if len(self.text) - self.position > MAX_ROW_BYTES:
                raise self.broken(f"no end of the row within {MAX_ROW_BYTES:,} characters")
            self._read()

    def broken(self, problem: str) -> DataError:
        return DataError(
            f"{self.path}:{self.line}: not a JSON array: {problem}. The rows after it cannot be separated, so the "
            "whole file is refused; repair it, or write one JSON object per line (.jsonl)"
        )

    def _at_error(self, error: Exception) -> DataError:
        at = error.pos if isinstance(error, json.JSONDecodeError) else self.position
        self.line += self.text.count("\n", self.position, at)
        return self.broken(str(error).partition(":")[0])

    def _move(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def _read(self) -> bool:
        chunk = self.file.read(CHUNK)
        self.ended = not chunk
        self.text, self.position = self.text[self.position :] + chunk, 0
        return bool(chunk)


def _csv(path: Path) -> Records:
    with open(path, "rb") as file:
        _check_text(file.read(4), path)
    csv.field_size_limit(MAX_ROW_BYTES)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        header = _header(reader, path)
        while True:
            start = reader.line_num + 1
            lines.seen.clear()
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                yield _bad_csv(e, start, lines, path)
                continue
            if len(fields) == len(header):
                yield SourceRecord(start, dict(zip(header, fields, strict=True)))
            elif fields:
                reason = (
                    f"{len(fields)} fields, but the header has {len(header)}; quote fields with commas or line breaks"
                )
                yield Unreadable(start, reason, kept("".join(lines.seen)))


class _Lines:
    """Iterates over the lines of a file and keeps those of the current row."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.seen = file, list[str]()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.file)
        self.seen.append(line)
        return line


def _header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as e:
        raise DataError(f"{path}:1: the header is not CSV: {e}") from e
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        raise DataError(f"{path}:1: the header has a single column, {header[0][:80]!r}; separate columns by commas")
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise DataError(f"{path}:1: duplicate column '{twice}' in the header; give each column a unique name")
    return header


def _bad_csv(error: csv.Error, start: int, lines: _Lines, path: Path) -> Unreadable:
    if "unexpected end of data" in str(error):
        raise DataError(
            f"{path}:{start}: a quote opened in this row is never closed and includes the file's remaining "
            f"{len(lines.seen) - 1} lines, so the whole file is refused; close the quote, or double it"
        )
    reason = f"not CSV: {error}; double a quote inside a quoted field"
    return Unreadable(start, reason, kept("".join(lines.seen)))


def _parquet(path: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(ROWS_PER_BATCH):
            for row in _rows(batch):
                number += 1
                yield Unreadable(number, row, "") if isinstance(row, str) else SourceRecord(number, row)
    except pa.ArrowException as e:
        raise DataError(f"{path}: not a Parquet file, or a truncated one: {str(e).splitlines()[0]}") from e


def _rows(batch: "pa.RecordBatch") -> list[dict[str, Any] | str]:
    """The rows of a batch; for a row that is not UTF-8, the reason instead."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as e:
        if len(batch) == 1:
            return [f"not UTF-8 at byte {e.start} of a text"]
        middle = len(batch) // 2
        return _rows(batch.slice(0, middle)) + _rows(batch.slice(middle))


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Readers by file extension."""
