"""Reads raw data artifacts, also of earlier versions of the schema, and several of them as one sequence of rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_assets.data.raw_schema import RAW_SCHEMA
from finetune_assets.data.rows import Row


@dataclass(frozen=True)
class RawPart:
    """A version of one source of raw data, as an experiment uses it.

    Attributes:
        name: Name of the source.
        file: Its Parquet file of `RAW_SCHEMA`.
        weight: Share of the training tokens, relative to the other sources; None uses every row.
        max_rows: Maximum number of rows; None uses all.
        replay: Whether this is an earlier version, of which rows that the current versions lack are trained on.
    """

    name: str
    file: Path
    weight: float | None = None
    max_rows: int | None = None
    replay: bool = False


def raw_batches(
    files: Sequence[Path], rows: int, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Rows of several raw data artifacts in order, as batches with the columns of `RAW_SCHEMA`.

    Args:
        files: Parquet files of the artifacts.
        rows: Maximum number of rows of a batch.
        columns: Columns to read; by default all.

    Yields:
        Index of the file, and a batch. A column or field that an earlier version of the schema lacks is null.
    """
    schema = RAW_SCHEMA if columns is None else pa.schema([RAW_SCHEMA.field(name) for name in columns])
    for index, path in enumerate(files):
        file = pq.ParquetFile(path)
        present = [name for name in schema.names if name in file.schema_arrow.names]
        for batch in file.iter_batches(rows, columns=present):
            yield index, as_schema(batch, schema)


def number_of_rows(files: Sequence[Path]) -> int:
    """Number of rows of several raw data artifacts, from their metadata."""
    return sum(pq.ParquetFile(path).metadata.num_rows for path in files)


def as_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A batch with the columns of a later version of its schema."""
    if batch.schema.equals(schema):
        return batch
    return pa.RecordBatch.from_arrays([_column(batch, field) for field in schema], schema=schema)


def _column(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
    if field.name not in batch.schema.names:
        return pa.nulls(len(batch), field.type)
    column = batch.column(field.name)
    return column if column.type.equals(field.type) else pa.array(column.to_pylist(), field.type)


def rows_at(files: Sequence[Path], numbers: Sequence[int], columns: Sequence[str] | None = None) -> list[Row]:
    """Rows of several raw data artifacts by number; reading stops after the last of them.

    Args:
        files: Parquet files of the artifacts.
        numbers: Numbers of the rows, from 0 in the first artifact, counting on in the next.
        columns: Columns to read; by default all.
    """
    wanted, start, rows = np.asarray(numbers, np.int64), 0, dict[int, Row]()
    for _, batch in raw_batches(files, 10_000, columns):
        here = np.unique(wanted[(wanted >= start) & (wanted < start + len(batch))])
        taken = batch.take(pa.array(here - start)).to_pylist()
        rows |= dict(zip(here.tolist(), taken, strict=True))
        start += len(batch)
        if start > wanted.max(initial=-1):
            break
    return [rows[int(number)] for number in wanted]


def same_rows(path: Path, other: Path) -> bool:
    """Whether two Parquet files, of any version of the schema, have exactly the same rows in the same order."""
    files = [pq.ParquetFile(path), pq.ParquetFile(other)]
    if files[0].metadata.num_rows != files[1].metadata.num_rows:
        return False
    pairs = zip(raw_batches([path], 10_000), raw_batches([other], 10_000), strict=False)
    return all(ours.equals(theirs) for (_, ours), (_, theirs) in pairs)
