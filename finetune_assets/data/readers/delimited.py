"""Reads CSV and TSV.

Where the quotes of a row are broken, it is uncertain which of the next lines belong to it. So every line that may
belong to it is set aside, and the rows after it count as good once a well-quoted row, or the end of the file, shows
that no closing quote is missing.
"""

import csv
import re
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers.opening import open_text, read_start
from finetune_assets.data.readers.quotes import Quotes
from finetune_assets.data.readers.records import (
    MAX_COLUMNS,
    MAX_ROW_BYTES,
    Records,
    SourceRecord,
    Unreadable,
    count_blank,
    kept,
)
from finetune_assets.data.sensitive import masked

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}
MARGINS = "\ufeff \t"
"""Characters around a name in a header; the first is a byte order mark inside of a file."""


def read_delimited(path: Path, delimiter: str) -> Records:
    """Read the rows of a table with a header.

    Args:
        path: The file.
        delimiter: Character between the fields of a row.

    Raises:
        DataError: naming file and line, if the file as a whole cannot be read.
    """
    read_start(path)
    csv.field_size_limit(MAX_ROW_BYTES)
    with open_text(path) as file:
        lines = _Lines(file, path, Quotes(delimiter))
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        yield from _Table(reader, lines, _header(reader, path, delimiter), path).records()


class _Lines:
    """Iterates over the lines of a file, keeps those of the current row, and takes lines back.

    Attributes:
        number: Number of the last line.
        seen: Lines of the current row.
    """

    def __init__(self, file: TextIO, path: Path, quotes: Quotes) -> None:
        self._read_line, self.path, self.quotes = file.readline, path, quotes
        self.number, self.seen = 0, list[str]()
        self._returned = deque[str]()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.take()
        if not line:
            raise StopIteration
        self.seen.append(line)
        return self.quotes.without_blanks(line, len(self.seen) == 1) if ' "' in line else line

    def take(self) -> str:
        """The next line; empty at the end of the file."""
        line = self._returned.popleft() if self._returned else self._read_line(MAX_ROW_BYTES + 1)
        if line:
            self.number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(f"{self.path}:{self.number}: line exceeds {MAX_ROW_BYTES:,} characters; split the row")
        return line

    def give_back(self, lines: list[str]) -> None:
        self._returned.extendleft(reversed(lines))
        self.number -= len(lines)


class _Table:
    """The rows below a header.

    Attributes:
        doubt: Line of a row with broken quotes to which the next rows may belong; 0 if there is none.
        held: Rows without quotes since then, each with its lines.
        lone: Line of a row of a single field, directly before the current row; 0 if there is none.
    """

    def __init__(self, reader: Iterator[list[str]], lines: _Lines, header: list[str], path: Path) -> None:
        self.reader, self.lines, self.header, self.path = reader, lines, header, path
        self.doubt, self.lone = 0, 0
        self.held = list[tuple[int, SourceRecord | Unreadable, list[str]]]()
        self.held_size = 0

    def records(self) -> Records:
        blank = 0
        while True:
            self.lines.seen = []
            start = self.lines.number + 1
            try:
                fields = next(self.reader)
            except StopIteration:
                break
            except csv.Error as e:
                yield from self._broken(e, start)
                continue
            if not fields:
                blank = count_blank(blank, self.path, start)
                continue
            blank = 0
            record = self._record(fields, start)
            if self.doubt or isinstance(record, Unreadable):
                yield from self._in_doubt(record, start)
            else:
                yield record
        yield from self._release()

    def _record(self, fields: list[str], start: int) -> SourceRecord | Unreadable:
        count, lone = len(self.header), self.lone
        self.lone = start if len(fields) == 1 < count else 0
        if len(fields) != count:
            reason = f"{len(fields)} fields, but the header has {count}; quote fields with separators or line breaks"
        elif lone:
            reason = f"follows line {lone} of a single field, and may be its second half; quote fields with line breaks"
        elif fields[-1].strip(MARGINS) == self.header[-1] and self._is_header(fields):
            reason = "repeats the header; remove the line"
        else:
            return SourceRecord(start, dict(zip(self.header, fields, strict=True)))
        return Unreadable(start, reason, kept("".join(self.lines.seen)))

    def _is_header(self, fields: list[str]) -> bool:
        return [field.strip(MARGINS) for field in fields] == self.header

    def _in_doubt(self, record: SourceRecord | Unreadable, start: int) -> Records:
        """A row after broken quotes, or a bad row."""
        lines = self.lines.seen
        text = "".join(lines)
        if '"' not in text:
            if not self.doubt:
                yield record
                return
            self.held.append((start, record, lines))
            self.held_size += len(text)
            if self.held_size > MAX_ROW_BYTES:  # no row is that long
                yield from self._release()
            return
        is_clean = self.lines.quotes.are_clean(text)
        if is_clean:
            yield from self._release()
        elif self.doubt:
            yield from self._set_aside()
            yield from self._aside(start, lines)
            return
        yield record
        self.doubt = start if isinstance(record, Unreadable) else self.doubt

    def _broken(self, error: csv.Error, start: int) -> Records:
        """Set aside a row with broken quotes: all lines up to the quote that may close it."""
        quotes, lines, self.lone = self.lines.quotes, self.lines.seen, 0
        is_unclosed = "unexpected end of data" in str(error)
        if "field larger" in str(error) or (is_unclosed and not self.doubt):
            where = f"within {MAX_ROW_BYTES:,} characters" if not is_unclosed else "and includes the file's remaining"
            more = f" {len(lines) - 1} lines" if is_unclosed else ""
            raise DataError(
                f"{self.path}:{start}: a quote opened in this row is never closed {where}{more}, so the whole file is "
                "refused; close the quote, or double it"
            )
        if self.doubt and (is_unclosed or len(lines) > 1):  # its first quote may close the row in doubt
            self.lines.give_back(lines[1:])
            yield from self._set_aside()
            yield from self._aside(start, lines[:1])
            return
        if self.doubt and not quotes.open_first(lines[0]):
            yield from self._set_aside()
        yield from self._release()
        is_open = False
        for line in lines:
            is_open = quotes.is_open_after(line, is_open)
        more_lines = self._lines_to_close(sum(map(len, lines))) if is_open else []
        reason = f"not CSV: {error}; double a quote inside a quoted field"
        yield Unreadable(start, reason, kept(lines[0]))
        self.doubt = start
        yield from self._aside(start + 1, [*lines[1:], *more_lines])

    def _lines_to_close(self, size: int) -> list[str]:
        """Take the lines up to one with a closing quote; none if no quote in reach closes the row."""
        taken = list[str]()
        while size <= MAX_ROW_BYTES and (line := self.lines.take()):
            taken.append(line)
            size += len(line)
            if not self.lines.quotes.is_open_after(line, True):
                return taken
        self.lines.give_back(taken)
        return []

    def _aside(self, start: int, lines: list[str]) -> Records:
        """Set aside lines that may belong to the row in doubt, each as a row, so that the loss is counted."""
        for number, line in enumerate(lines, start):
            if line.strip():
                yield Unreadable(
                    number, f"may belong to the row of line {self.doubt}, whose quotes are broken", kept(line)
                )

    def _set_aside(self) -> Records:
        """Set aside the rows that were held."""
        for start, _, lines in self.held:
            yield from self._aside(start, lines)
        self.held, self.held_size = [], 0

    def _release(self) -> Records:
        """End the doubt: the rows that were held are good."""
        for _, record, _ in self.held:
            yield record
        self.held, self.held_size, self.doubt = [], 0, 0


def _header(reader: Iterator[list[str]], path: Path, delimiter: str) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as e:
        raise DataError(f"{path}:1: the header is not CSV: {e}") from e
    others = "".join(SEPARATORS.keys() - {delimiter})
    if len(header) == 1 and re.search(f"[{others}]", header[0]):
        shown = masked(header[0])[:80]
        raise DataError(
            f"{path}:1: the header has a single column, {shown!r}; separate columns by {SEPARATORS[delimiter]}"
        )
    if len(header) > MAX_COLUMNS:
        raise DataError(f"{path}:1: {len(header):,} columns; at most {MAX_COLUMNS:,} are supported")
    if twice := next((name for name, count in Counter(header).items() if count > 1), None):
        raise DataError(f"{path}:1: duplicate column '{twice}' in the header; give each column a unique name")
    return header
