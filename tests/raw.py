"""Raw data as tests make and read it."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.ingest import PARQUET, QUARANTINE, write_raw
from finetune_assets.data.readers import SourceFile
from finetune_assets.data.rows import Row

OPTIONAL = ("tools", "rejected", "rejected_messages", "label", "adapter")
"""Columns that most rows have no value in."""


def ingest(out: Path, *files: Path, columns: Columns | None = None) -> Path:
    """Write the raw data of some files into a folder; returns the Parquet file."""
    out.mkdir(parents=True, exist_ok=True)
    write_raw([SourceFile(file.name, file) for file in files], columns or Columns(), out)
    return out / PARQUET


def rows_of(*files: Path, out: Path, columns: Columns | None = None) -> list[Row]:
    """The good rows of some files, without the optional columns and keys of turns that have no value."""
    return [_compact(row) for row in pq.read_table(ingest(out, *files, columns=columns)).to_pylist()]


def _compact(row: Row) -> Row:
    turns = row["messages"]
    if turns is not None:
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    return {key: value for key, value in {**row, "messages": turns}.items() if key not in OPTIONAL or value is not None}


def quarantined(out: Path) -> list[dict[str, Any]]:
    """The bad rows that `ingest` set aside."""
    return [json.loads(line) for line in (out / QUARANTINE).read_text(encoding="utf-8").splitlines()]
