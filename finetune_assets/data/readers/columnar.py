"""Reads Parquet and Arrow files."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers.opening import LFS_POINTER, LFS_PROBLEM
from finetune_assets.data.readers.records import Records, SourceRecord, Unreadable

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BATCH = 1_000
ARROW_FILE = b"ARROW1"


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
        _check_columns(file.schema_arrow.names, path)
        yield from _records(file.iter_batches(ROWS_PER_BATCH))
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
        with pa.OSFile(str(path)) as source:
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            _check_columns(reader.schema.names, path)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches)) if is_file else reader
            yield from _records(_in_parts(batches))
    except pa.ArrowException as e:
        raise DataError(f"{path}: not an Arrow file, or a truncated one: {str(e).splitlines()[0]}") from e


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(LFS_POINTER):
        raise DataError(f"{path}: this is {LFS_PROBLEM}")
    return start


def _check_columns(names: list[str], path: Path) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{path}: duplicate column '{twice}'; give each column a unique name")


def _in_parts(batches: Iterable["pa.RecordBatch"]) -> Iterable["pa.RecordBatch"]:
    for batch in batches:
        for start in range(0, len(batch), ROWS_PER_BATCH):
            yield batch.slice(start, ROWS_PER_BATCH)


def _records(batches: Iterable["pa.RecordBatch"]) -> Records:
    number = 0
    for batch in batches:
        nested = [field.name for field in batch.schema if field.type.num_fields]
        for row in _rows(batch):
            number += 1
            if isinstance(row, str):
                yield Unreadable(number, row, "")
            else:
                yield SourceRecord(number, row | {name: _without_nulls(row[name]) for name in nested})


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
