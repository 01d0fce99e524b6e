"""Reads documents: text and Markdown files as a whole, and one document per row of all formats of rows.

A file is read in bounded memory. A text file that is longer than `PART_CHARACTERS` is read in parts, each of which is
split into passages separately.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from finetune_assets.config.documents_schema import DocumentColumns
from finetune_assets.config.errors import suggest
from finetune_assets.data.errors import DataError
from finetune_assets.data.readers import (
    DOCUMENT_FORMATS,
    MARKDOWN_ENDINGS,
    TEXT_ENDINGS,
    SourceFile,
    SourceRecord,
    Unreadable,
    read_records,
)
from finetune_assets.data.readers.opening import open_text, read_start

PART_CHARACTERS = 4 << 20
"""Maximum size of a part of a text file; a file that is one passage may not be longer."""
TEXT_COLUMNS = ("text", "content", "body", "passage", "context")
SHOWN_KEYS = 10


@dataclass(frozen=True)
class Document:
    """A document, or a part of a long one.

    Attributes:
        text: Its text.
        source: Where it is from: the file's name and, of several documents in a file, the document's id.
        title: Its title; may be empty.
        markdown: Whether headings of the text are titles.
        part: Number of the part, from 0.
        has_more: Whether more parts follow.
    """

    text: str
    source: str
    title: str = ""
    markdown: bool = False
    part: int = 0
    has_more: bool = False


def read_documents(files: Iterable[SourceFile], columns: DocumentColumns) -> Iterator[Document]:
    """Read all documents of files, in order.

    Raises:
        DataError: naming the file, and the line or row, if a document cannot be read.
    """
    for file in files:
        ending = DOCUMENT_FORMATS.suffix_of(file.path)
        if ending in TEXT_ENDINGS:
            yield from _text_file(file, ending in MARKDOWN_ENDINGS)
        else:
            yield from _rows(file, columns)


def _text_file(file: SourceFile, markdown: bool) -> Iterator[Document]:
    try:
        read_start(file.path)
        with open_text(file.path) as opened:
            texts = _parts(opened, file)
            text, part = next(texts), 0
            for following in texts:
                yield Document(text, file.name, markdown=markdown, part=part, has_more=True)
                text, part = following, part + 1
            yield Document(text, file.name, markdown=markdown, part=part)
    except (EOFError, zlib.error) as e:
        raise DataError(f"{file.path}: not a compressed file, or a truncated one: {e}; copy it again") from e
    except OSError as e:
        raise DataError(f"{file.path}: cannot be read: {e.strerror or e}") from e


def _parts(opened: TextIO, file: SourceFile) -> Iterator[str]:
    """The text in parts that end at the end of a paragraph, or else of a line or a word; at least one part."""
    rest = ""
    while chunk := opened.read(PART_CHARACTERS):
        rest = _checked(rest + chunk, file)
        while len(rest) > PART_CHARACTERS:
            end = _end_of_part(rest)
            yield rest[:end]
            rest = rest[end:]
    yield rest


def _end_of_part(text: str) -> int:
    for mark in ("\n\n", "\n", " "):
        if (end := text.rfind(mark, PART_CHARACTERS // 2, PART_CHARACTERS)) >= 0:
            return end + len(mark)
    return PART_CHARACTERS


def _checked(text: str, file: SourceFile) -> str:
    """The text with line ends `\\n`; bytes that are not UTF-8, and NUL characters, are refused."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as e:
            line = text.count("\n", 0, e.start) + 1
            raise DataError(f"{file.path}: not UTF-8 near line {line:,}; save the file as UTF-8") from None
    if "\0" in text:
        raise DataError(f"{file.path}: contains a NUL character, so it is not a text; remove the file")
    return text.replace("\r\n", "\n") if "\r" in text else text


def _rows(file: SourceFile, columns: DocumentColumns) -> Iterator[Document]:
    for record in read_records(file.path):
        where = f"{file.path}:{record.line}"
        if isinstance(record, Unreadable):
            raise DataError(f"{where}: {record.reason}")
        yield _document(record, file, columns, where)


def _document(record: SourceRecord, file: SourceFile, columns: DocumentColumns, where: str) -> Document:
    row = record.row
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object with the text of a document, but {type(row).__name__}")
    text = _value(row, _column(row, "text", columns.text, TEXT_COLUMNS, where), where)
    title = _value(row, _column(row, "title", columns.title, ("title",)), where)
    name = _value(row, _column(row, "id", columns.id, ("id",)), where, numbers=True)
    return Document(text, f"{file.name}#{name or record.line}", " ".join(title.split()))


def _column(row: dict[str, Any], setting: str, name: str | None, known: Sequence[str], where: str = "") -> str | None:
    """Name of the column of a setting; None if there is none.

    Raises:
        DataError: if `where` is given, or the setting names a column, and the row lacks the column.
    """
    found = [column for column in ([name] if name else known) if column in row]
    if len(found) > 1 and where:
        raise DataError(f"{where}: both '{found[0]}' and '{found[1]}' may be the text; name one as columns.{setting}")
    if not found and where:
        keys = ", ".join(list(map(str, row))[:SHOWN_KEYS]) or "none"
        problem = f"no column '{name}'; {suggest(name, map(str, row))}" if name and row else f"columns: {keys}"
        raise DataError(f"{where}: no text of a document; name its column as columns.{setting} ({problem})")
    return found[0] if found else None


def _value(row: dict[str, Any], column: str | None, where: str, numbers: bool = False) -> str:
    """Text of a column; empty if it is null."""
    value = row[column] if column else None
    if value is None:
        return ""
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{column}' is not text, but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: '{column}' has half of a character (a surrogate); write the character") from None
    return value.replace("\0", "")
