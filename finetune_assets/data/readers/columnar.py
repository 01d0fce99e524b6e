"""Reads Parquet and Arrow files."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers.arrow_messages import MAGIC_BYTES, check_batches
from finetune_assets.data.readers.opening import LFS_POINTER, LFS_PROBLEM
from finetune_assets.data.readers.parquet_pages import ROWS_PER_BATCH, check_rows, plan_reading
from finetune_assets.data.readers.records import (
    MAX_COLUMNS,
    MAX_ROW_BYTES,
    Records,
    SourceRecord,
    Unreadable,
    too_long,
)

if TYPE_CHECKING:
    import pyarrow as pa

ARROW_FILE = b"ARROW1"
FREE_BYTES, EXPANSION = 64 << 20, 500
"""Size of the rows up to which a file may have any ratio, and the maximum ratio beyond: repeated values need none."""


def read_parquet(path: Path) -> Records:
    """Read the rows of a Parquet file.

    Raises:
        DataError: if it is not a complete Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _first_bytes(path)
    try:
        file = pq.ParquetFile(path)
        plan = plan_reading(file, path)
        _check_columns(file.schema_arrow.names, path)
        if plan.dictionaries:
            file = pq.ParquetFile(path, read_dictionary=plan.dictionaries)
        yield from _records(file.iter_batches(plan.rows), path)
    except pa.ArrowException as e:
        raise DataError(f"{path}: not a Parquet file, or a truncated one: {str(e).splitlines()[0]}") from e


def read_arrow(path: Path) -> Records:
    """Read the rows of an Arrow file, in the file or the stream format.

    Raises:
        DataError: if it is not a complete Arrow file.
    """
    import pyarrow as pa

    is_file = _first_bytes(path).startswith(ARROW_FILE)
    try:
        count = check_batches(path, is_file)
        with pa.OSFile(str(path)) as source:
            if is_file and pa.ipc.open_file(source).num_record_batches != count:
                raise pa.ArrowInvalid(f"its footer names another number of batches than the {count} that it has")
            source.seek(MAGIC_BYTES if is_file else 0)  # a footer may also point to what is no message
            reader = pa.ipc.open_stream(source)
            _check_columns(reader.schema.names, path)
            yield from _records(_in_parts(reader, path), path)
    except pa.ArrowException as e:
        raise DataError(f"{path}: not an Arrow file, or a truncated one: {str(e).splitlines()[0]}") from e


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(LFS_POINTER):
        raise DataError(f"{path}: this is {LFS_PROBLEM}")
    return start


def _check_columns(names: list[str], path: Path) -> None:
    if len(names) > MAX_COLUMNS:
        raise DataError(f"{path}: {len(names):,} columns; at most {MAX_COLUMNS:,} are supported")
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise DataError(f"{path}: duplicate column '{twice}'; give each column a unique name")


def _in_parts(batches: Iterable["pa.RecordBatch"], path: Path) -> Iterable["pa.RecordBatch"]:
    rows = 0
    for batch in batches:
        rows += len(batch)
        check_rows(rows, path)
        for start in range(0, len(batch), ROWS_PER_BATCH):
            yield batch.slice(start, ROWS_PER_BATCH)


def _records(batches: Iterable["pa.RecordBatch"], path: Path) -> Records:
    number, schema, decoded = 0, None, 0
    most = max(FREE_BYTES, EXPANSION * path.stat().st_size)
    nested, is_shared = list[str](), False
    for batch in batches:
        if schema is None:
            schema = batch.schema
            nested = [field.name for field in schema if field.type.num_fields]
            is_shared = any(_is_shared(field.type) for field in schema)
        decoded += _size_of(batch, is_shared)
        if decoded > most:
            raise DataError(
                f"{path}: its rows have more than {most:,} bytes, {EXPANSION} times those of the file, so the file is "
                "refused; write it without repeated values"
            )
        for part in _small_parts(batch, is_shared):
            for row in [too_long(part)] if isinstance(part, int) else _rows(part):
                number += 1
                if isinstance(row, str):
                    yield Unreadable(number, row, "")
                elif nested:
                    yield SourceRecord(number, row | {name: _without_nulls(row[name]) for name in nested})
                else:
                    yield SourceRecord(number, row)


def _small_parts(batch: "pa.RecordBatch", is_shared: bool) -> Iterator["pa.RecordBatch | int"]:
    """Parts of a batch of at most `MAX_ROW_BYTES`; of a row that is longer, its size.

    Args:
        batch: The batch.
        is_shared: Whether its values may share memory.
    """
    size = _size_of(batch, is_shared)
    if size <= MAX_ROW_BYTES:
        yield batch
    elif len(batch) == 1:
        yield size
    else:
        middle = len(batch) // 2
        yield from _small_parts(batch.slice(0, middle), is_shared)
        yield from _small_parts(batch.slice(middle), is_shared)


def _size_of(batch: "pa.RecordBatch", is_shared: bool) -> int:
    return sum(_decoded_bytes(column) for column in batch.columns) if is_shared else int(batch.nbytes)


def _decoded_bytes(column: "pa.Array") -> int:
    """Size of a column with all its texts written out, which may be much more than its own size."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type) and _is_text(column.type.value_type):
        lengths = pc.take(pc.binary_length(column.dictionary), column.indices)
        return int(pc.sum(lengths).as_py() or 0) + 8 * len(column)
    if not _is_shared(column.type):
        return int(column.nbytes)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _decoded_bytes(column.flatten()) + 8 * len(column)
    if pa.types.is_struct(column.type):
        return sum(_decoded_bytes(child) for child in column.flatten())
    return int(column.nbytes) * max(1, len(column))


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _is_shared(kind: "pa.DataType") -> bool:
    """Whether several values of a type may be one in memory."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return True
    return any(_is_shared(kind.field(index).type) for index in range(kind.num_fields))


def _without_nulls(value: Any) -> Any:
    """A nested value without keys that are null: the objects of a column have the same keys, also those they lack."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _rows(batch: "pa.RecordBatch") -> list[dict[str, Any] | str]:
    """The rows of a batch; for a row with a value that Python cannot hold, the reason instead."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, LookupError) as e:  # LookupError: an unknown time zone
        if len(batch) == 1:
            bad_text = isinstance(e, UnicodeDecodeError)
            return [f"not UTF-8 at byte {e.start} of a text" if bad_text else f"cannot be read: {e}"]  # type: ignore[union-attr]
        middle = len(batch) // 2
        return _rows(batch.slice(0, middle)) + _rows(batch.slice(middle))
