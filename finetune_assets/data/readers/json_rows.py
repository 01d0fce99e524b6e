"""Reads JSON: one object per line, or an array of objects."""

import json
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers.opening import BYTE_ORDER_MARK, open_bytes, open_text, read_start
from finetune_assets.data.readers.records import (
    MAX_ROW_BYTES,
    MAX_SKIPPED_BYTES,
    Records,
    SourceRecord,
    Unreadable,
    count_blank,
    kept,
    too_long,
)

CHUNK = LONG = 1 << 20
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
END_OF_KEY = re.compile(r'"[ \t\r\n]*:')
KEY_OF_A_LIST = re.compile(rb'"([^"\\]+)"\s*:\s*\[')


class DuplicateKey(ValueError):
    """An object of a JSON text has a key twice."""


def read_json(path: Path) -> Records:
    """Read an array of rows, or one row per line; the first character selects which.

    Raises:
        DataError: naming file (and line), if the file as a whole cannot be read.
    """
    begins = read_start(path).removeprefix(BYTE_ORDER_MARK).lstrip()
    if begins[:1] == b"[":
        with open_text(path) as text:
            yield from _json_array(text, path)
        return
    _refuse_single_object(begins, path)
    with open_bytes(path) as file:
        yield from _json_lines(file, path)


def _refuse_single_object(begins: bytes, path: Path) -> None:
    """Raise `DataError` if the first object has several lines."""
    first = begins.partition(b"\n")[0].rstrip()
    if begins[:1] != b"{" or len(first) == len(begins.rstrip()) or first[-1:] not in (b"{", b"["):
        return
    key = KEY_OF_A_LIST.search(begins)
    rows = f"; if its key '{key[1].decode(errors='replace')}' holds the rows, write that array alone" if key else ""
    raise DataError(
        f"{path}: an object over several lines is neither an array of rows, [{{...}}, {{...}}], nor one JSON object "
        f"per line{rows}"
    )


def _json_lines(file: BinaryIO, path: Path) -> Records:
    number = blank = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            yield Unreadable(number, too_long(len(line) + _skip_line(file, line, path, number)), kept(line))
        elif line.strip():
            blank = 0
            yield _parsed(line, number, path)
        else:
            blank = count_blank(blank, path, number)


def _skip_line(file: BinaryIO, line: bytes, path: Path, number: int) -> int:
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(CHUNK)
        skipped += len(line)
        if skipped > MAX_SKIPPED_BYTES:
            raise DataError(
                f"{path}:{number}: no end of the line within {MAX_SKIPPED_BYTES:,} bytes, so the file is refused; "
                "write one JSON object per line"
            )
    return skipped


def _parsed(line: bytes, number: int, path: Path) -> SourceRecord | Unreadable:
    try:
        text = line.removeprefix(BYTE_ORDER_MARK).decode().rstrip()
        return SourceRecord(number, _unique_keys(text), line)
    except UnicodeDecodeError as e:
        reason = f"not UTF-8 at byte {e.start} of the line; save the file as UTF-8"
    except json.JSONDecodeError as e:
        if b"\r" in line.rstrip():
            raise DataError(f"{path}:{number}: lines end in CR alone; save the file with line ends LF or CRLF") from e
        reason = f"not JSON: {e.msg.removesuffix(' at')} at column {e.colno}; expected one JSON object per line"
    except DuplicateKey as e:
        reason = str(e)
    except (ValueError, RecursionError) as e:
        reason = f"cannot be read: {e}"
    return Unreadable(number, reason, kept(line))


def _unique_keys(text: str) -> Any:
    """Parse a JSON text in which no object has a key twice; a long one with the hook at once, not a second time."""
    if len(text) > LONG:
        return json.loads(text, object_pairs_hook=_object)
    value = json.loads(text)
    refuse_duplicate_keys(text, value)
    return value


def refuse_duplicate_keys(text: str, value: Any) -> None:
    """Check that no object of a JSON text has a key twice, because `json` keeps only the last of its values.

    Colons, and then the ends of keys, are counted first: a hook of `json` for each object takes twice the time of
    parsing. A text inside of which such an end occurs (as in a call of a tool) is parsed again with that hook.

    Args:
        text: The text of one JSON value.
        value: The parsed value.

    Raises:
        DuplicateKey: naming the key.
    """
    keys = _number_of_keys(value)
    if text.count(":") != keys and len(END_OF_KEY.findall(text)) != keys:
        json.loads(text, object_pairs_hook=_object)


def _number_of_keys(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    count, items = (len(value), value.values()) if isinstance(value, dict) else (0, value)
    return count + sum(_number_of_keys(item) for item in items if isinstance(item, (dict, list)))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):  # up to the first key that comes again, both have the same keys in the same order
        twice = next(key for (key, _), kept_key in zip_longest(pairs, row) if key != kept_key)
        raise DuplicateKey(f"duplicate key '{twice}': all values but the last would be lost")
    return row


def _json_array(file: TextIO, path: Path) -> Records:
    """Read the elements of a JSON array without loading all of it into memory."""
    array = _ArrayText(file, path)
    array.skip("[")
    while not array.at("]"):
        line = array.line
        value, text = array.element()
        try:
            refuse_duplicate_keys(text, value)
            yield SourceRecord(line, value)
        except DuplicateKey as e:
            yield Unreadable(line, str(e), kept(text))
        except RecursionError as e:
            yield Unreadable(line, f"cannot be read: {e}", kept(text))
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

    def element(self) -> tuple[Any, str]:
        """The element at the current position, and its text; reads more text until it is complete."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
                if end < len(self.text) or self.ended:  # otherwise a number might continue
                    text = self.text[self.position : end]
                    self._move(end)
                    return value, text
            except (json.JSONDecodeError, RecursionError) as e:
                if self.ended:
                    raise self._at_error(e) from e
            except ValueError as e:  # a number with too many digits
                raise self.broken(str(e).partition(";")[0]) from e
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
