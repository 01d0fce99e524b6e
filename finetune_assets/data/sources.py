"""Read the raw data from where it is, row by row, into one Parquet file of `RAW_SCHEMA`."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_assets.data.rows import RAW_SCHEMA
from finetune_assets.errors import UserError

SAMPLE = Path(__file__).parent.parent / "sample" / "dolly_sample.jsonl"
PARQUET = "rows.parquet"
ROWS_PER_BATCH = 10_000


class DataError(UserError):
    """Raw data that cannot be used, named by file and line."""


@dataclass(frozen=True)
class RawStatistics:
    """What one version of the raw data holds."""

    rows: int
    with_context: int
    categories: dict[str, int]
    preview: list[dict[str, str]]


def source_files(source: str, root: Path) -> list[Path]:
    """The files that a `raw_data.source` setting means, in reading order.

    Args:
        source: `sample`, a JSONL file, or a folder of them.
        root: What a relative path is relative to.

    Raises:
        DataError: if there is nothing to read there.
    """
    if source == "sample":
        return [SAMPLE]
    path = root / Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.jsonl") if file.is_file())
        if not files:
            raise DataError(f"{path}: this folder holds no file that ends in .jsonl")
        return files
    if not path.is_file():
        raise DataError(
            f"{path}: does not exist; `source` in raw_data.yaml, or FINETUNE_RAW_DATA, is '{source}': "
            "name a JSONL file, a folder of them, or 'sample'"
        )
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: rows must be JSON Lines (one JSON object a line) in a file that ends in .jsonl")
    return [path]


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a JSONL file in Dolly's schema. Blank lines are passed over.

    Raises:
        DataError: naming file, line and value, at the first row that is not one.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, f"{path}:{number}")


def _parse_row(line: bytes, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 at byte {e.start} of the line; save the file as UTF-8") from e
    except json.JSONDecodeError as e:
        raise DataError(f"{where}: not JSON: {e.msg} at column {e.colno}; one JSON object a line is expected") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: cannot be read: {e}") from e
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {_short(row)}")
    for key in row.keys() - set(RAW_SCHEMA.names):
        meant = "context" if key == "input" else next(iter(get_close_matches(key, RAW_SCHEMA.names, 1, 0.75)), None)
        if meant and not row.get(meant) and row[key]:
            raise DataError(f"{where}: unknown key '{key}' would be lost; did you mean '{meant}'?")
    return {name: _text(row, name, where) for name in RAW_SCHEMA.names}


def _text(row: dict[str, Any], name: str, where: str) -> str:
    required = name in ("instruction", "response")
    if required and name not in row:
        raise DataError(f"{where}: '{name}' is missing; found {', '.join(map(str, row)) or 'no keys'}")
    value = row.get(name) if row.get(name) is not None else ""
    if not isinstance(value, str):
        raise DataError(f"{where}: '{name}' must be text, found {_short(value)}")
    if required and not value.strip():
        raise DataError(f"{where}: '{name}' is blank; give it text or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{where}: '{name}' holds half of a surrogate pair at character {e.start}") from e
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_parquet(files: list[Path], out: Path) -> RawStatistics:
    """Write the rows of all files as `out/rows.parquet`; at most `ROWS_PER_BATCH` rows stand in memory.

    Raises:
        DataError: as `read_rows`, or if there is no row at all.
    """
    rows = (row for file in files for row in read_rows(file))
    categories: Counter[str] = Counter()
    preview: list[dict[str, str]] = []
    with_context = 0
    with pq.ParquetWriter(out / PARQUET, RAW_SCHEMA, compression="zstd") as writer:
        while batch := list(islice(rows, ROWS_PER_BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=RAW_SCHEMA))
            categories.update(row["category"] for row in batch)
            with_context += sum(bool(row["context"].strip()) for row in batch)
            preview += batch[: max(0, 5 - len(preview))]
    if not preview:
        raise DataError(f"{', '.join(map(str, files))}: no rows; the file is empty")
    return RawStatistics(categories.total(), with_context, dict(categories.most_common()), preview)
