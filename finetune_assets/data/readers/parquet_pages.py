"""Bounds the memory of reading a Parquet file by its page headers, before any page is decompressed.

A few bytes can describe gigabytes: a dictionary with one long text that a million rows name, a page of zeros, a million
empty rows. The sizes in the file's footer are not used where the reader does not use them either.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import unpack_from
from typing import TYPE_CHECKING, Any, BinaryIO

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers.records import MAX_COLUMNS

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ROWS_PER_BATCH = 1_000
BATCH_BYTES = 512 << 20
"""Size of the decoded texts of a batch, up to which it has `ROWS_PER_BATCH` rows."""
MAX_PAGE_BYTES, MAX_PAGE_VALUES = 256 << 20, 10_000_000
"""Size of a decompressed page, and its number of values."""
MAX_VALUES, FREE_VALUES, VALUES_PER_ROW = 50_000_000, 10_000_000, 100
"""Values of a column in a row group: at most `MAX_VALUES`, and at most `FREE_VALUES` and `VALUES_PER_ROW` a row."""
FREE_ROWS, ROWS_PER_BYTE = 1_000_000, 20
"""Rows of a file: any up to `FREE_ROWS`, beyond them `ROWS_PER_BYTE` of the file."""
EXPANSION = 64
"""Texts in lists may decode to this multiple of the column's size, or to 1 GiB; beyond it they stay in dictionaries."""
FIRST_BYTES, MAX_HEADER_BYTES = 512, 16 << 20
DATA, DICTIONARY = (5, 8), 7
"""Fields of a page header: of data pages in versions 1 and 2, and of dictionaries."""


@dataclass(frozen=True)
class Plan:
    """How a file is read.

    Attributes:
        rows: Rows per batch.
        dictionaries: Columns that stay in dictionaries until their rows are separated.
    """

    rows: int
    dictionaries: list[str]


@dataclass(frozen=True)
class Page:
    """A page's header: sizes in bytes, and where its content begins."""

    size: int
    compressed: int
    values: int
    content: int
    is_dictionary: bool


def plan_reading(file: "pq.ParquetFile", path: Path) -> Plan:
    """Check all page headers of a file, and choose how it is read.

    Raises:
        DataError: if reading a page or a row would require too much memory.
    """
    metadata = file.metadata
    if metadata.num_columns > MAX_COLUMNS:
        raise DataError(f"{path}: {metadata.num_columns:,} columns; at most {MAX_COLUMNS:,} are supported")
    check_rows(metadata.num_rows, path)
    rows, dictionaries = ROWS_PER_BATCH, set[str]()
    with path.open("rb") as stream:
        for group in range(metadata.num_row_groups):
            longest = 0
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                page = _dictionary(stream, column, metadata.row_group(group).num_rows, path)
                if page and "." not in column.path_in_schema:
                    longest += page.size
                elif page and _expands(stream, page, column):
                    dictionaries.add(column.path_in_schema)
            rows = min(rows, max(1, BATCH_BYTES // max(1, longest)))
    return Plan(rows, sorted(dictionaries))


def check_rows(rows: int, path: Path) -> None:
    """Check that a file is large enough to hold the rows that it names.

    Raises:
        DataError: if it is not.
    """
    size = path.stat().st_size
    if rows > max(FREE_ROWS, ROWS_PER_BYTE * size):
        raise DataError(f"{path}: {rows:,} rows in a file of {size:,} bytes, which cannot hold them; remove empty rows")


def _dictionary(stream: BinaryIO, column: Any, rows: int, path: Path) -> Page | None:
    """The dictionary page of a column of texts, if it has one."""
    values, where = column.num_values, f"{path}: column '{column.path_in_schema}'"
    if values > min(MAX_VALUES, FREE_VALUES + VALUES_PER_ROW * rows):
        raise DataError(f"{where}: {values:,} values in {rows:,} rows; split the rows, or write smaller row groups")
    dictionary = None
    for page in _pages(stream, column, where):
        if page.size > MAX_PAGE_BYTES or page.values > MAX_PAGE_VALUES:
            raise DataError(
                f"{where}: a page of {page.size:,} bytes and {page.values:,} values; at most {MAX_PAGE_BYTES:,} bytes "
                f"and {MAX_PAGE_VALUES:,} values are supported; write the file with smaller pages"
            )
        if page.is_dictionary and column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
            dictionary = page
    return dictionary


def _expands(stream: BinaryIO, page: Page, column: Any) -> bool:
    """Whether the texts of a column in lists may be much longer than what the file has of them."""
    most = max(1 << 30, EXPANSION * column.total_uncompressed_size)
    return page.size * column.num_values > most and _longest_text(stream, page, column) * column.num_values > most


def _pages(stream: BinaryIO, column: Any, where: str) -> Iterator[Page]:
    start = column.dictionary_page_offset or column.data_page_offset
    position, end = min(start, column.data_page_offset), start + column.total_compressed_size
    while position < end:
        try:
            page = _page(stream, position)
        except (IndexError, KeyError, RecursionError) as e:
            raise DataError(f"{where}: damaged page at byte {position}; write the file again") from e
        yield page
        position = page.content + page.compressed


def _page(stream: BinaryIO, position: int) -> Page:
    size = FIRST_BYTES
    while True:
        stream.seek(position)
        content = stream.read(size)
        try:
            fields, length = _struct(content, 0)
            break
        except IndexError:
            if len(content) < size or size > MAX_HEADER_BYTES:
                raise
            size *= 32  # statistics in a header may be long
    if fields[2] < 0 or fields[3] < 0:
        raise IndexError
    values = next((fields[number].get(1, 0) for number in (*DATA, DICTIONARY) if number in fields), 0)
    return Page(fields[2], fields[3], values, position + length, DICTIONARY in fields)


def _longest_text(stream: BinaryIO, page: Page, column: Any) -> int:
    """Length of the longest text of a dictionary page; of one that cannot be decompressed here, the page's size."""
    import pyarrow as pa

    stream.seek(page.content)
    content = stream.read(page.compressed)
    codec = {"LZ4": "lz4_raw", "LZ4_RAW": "lz4_raw"}.get(column.compression, column.compression.lower())
    try:
        if codec != "uncompressed":
            content = pa.decompress(content, decompressed_size=page.size, codec=codec, asbytes=True)
    except (pa.ArrowException, OSError, ValueError):
        return page.size
    position = longest = 0
    while position + 4 <= len(content):
        (length,) = unpack_from("<I", content, position)
        longest, position = max(longest, length), position + 4 + length
    return min(longest, page.size)


def _struct(content: bytes, position: int) -> tuple[dict[int, Any], int]:
    """The integers and structs of a struct in Thrift's compact protocol, by field number, and where it ends."""
    fields, number = dict[int, Any](), 0
    while header := content[position]:
        position += 1
        if header >> 4:
            number += header >> 4
        else:
            number, position = _integer(content, position)
        fields[number], position = _value(content, position, header & 15)
    return fields, position + 1


def _value(content: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # a boolean is in its header
        return kind == 1, position
    if kind in (3, 7):
        return None, position + (1 if kind == 3 else 8)
    if kind in (4, 5, 6):
        return _integer(content, position)
    if kind == 8:
        length, position = _varint(content, position)
        return None, position + length
    if kind in (9, 10):
        return _list(content, position)
    if kind == 12:
        return _struct(content, position)
    raise KeyError(kind)


def _list(content: bytes, position: int) -> tuple[None, int]:
    header, position = content[position], position + 1
    size, kind = header >> 4, header & 15
    if size == 15:
        size, position = _varint(content, position)
    for _ in range(size):
        _, position = (None, position + 1) if kind in (1, 2) else _value(content, position, kind)
    return None, position


def _integer(content: bytes, position: int) -> tuple[int, int]:
    number, position = _varint(content, position)
    return (number >> 1) ^ -(number & 1), position


def _varint(content: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[position]
        position += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, position
        if shift > 70:
            raise IndexError
