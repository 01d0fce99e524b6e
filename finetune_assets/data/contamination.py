"""Contamination: training rows that contain text which models are evaluated on."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune_assets.data.errors import DataError
from finetune_assets.data.folding import words_of
from finetune_assets.data.near_duplicates import word_sequences
from finetune_assets.data.quality import SHOWN
from finetune_assets.data.raw_files import raw_batches
from finetune_assets.data.rows import Row, texts_of

WORDS = 13
"""Words in a row, up to case, spaces and punctuation, that make a row contaminated (as for GPT-3, arXiv:2005.14165)."""
ROWS_PER_BATCH = 1_000
DOCUMENT_SUFFIXES = (".jsonl", ".json", ".csv")
_TABLE_BITS = 20


@dataclass
class Contamination:
    """Training rows that share `WORDS` words in a row with a text.

    Attributes:
        rows: Number of such rows.
        first: The first of them, each with the number of the text (from 0).
        texts: Number of texts.
        short_texts: Number of texts with fewer words, which are never found.
        searched: Number of rows.
    """

    rows: int = 0
    first: list[tuple[int, int]] = field(default_factory=list)
    texts: int = 0
    short_texts: int = 0
    searched: int = 0


def contamination(rows: Iterable[tuple[int, Row]], texts: Sequence[str], n: int = WORDS) -> Contamination:
    """Count rows that contain `n` words in a row of a text.

    Args:
        rows: Rows with their numbers.
        texts: Texts of an evaluation.
        n: Number of words.
    """
    words = words_of(texts)
    sequences, owners = word_sequences(words, n)
    known, first = np.unique(sequences, return_index=True)
    found = Contamination(texts=len(texts), short_texts=int((words.counts < n).sum()))
    if not len(known):
        return found
    table = np.zeros(1 << _TABLE_BITS, np.bool_)  # most sequences are unknown, and one look-up shows it
    table[_slots(known)] = True
    for numbers, parts in _batches(rows):
        found.searched += len(np.unique(numbers))
        ours, rows_of_ours = word_sequences(words_of(parts), n)
        candidates = np.flatnonzero(table[_slots(ours)])
        at = np.minimum(np.searchsorted(known, ours[candidates]), len(known) - 1)
        hits = known[at] == ours[candidates]
        contaminated, once = np.unique(numbers[rows_of_ours[candidates[hits]]], return_index=True)
        found.rows += len(contaminated)
        named = owners[first[at[hits][once]]]
        found.first += list(zip(contaminated.tolist(), named.tolist(), strict=True))[: SHOWN - len(found.first)]
    return found


def _slots(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)


def _batches(rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
    """Parts of rows, each with the number of its row; a row is in one batch."""
    numbers, parts = list[int](), list[str]()
    for number, row in rows:
        own = texts_of(row)
        numbers += [number] * len(own)
        parts += own
        if len(parts) >= ROWS_PER_BATCH:
            yield np.array(numbers), parts
            numbers, parts = [], []
    if parts:
        yield np.array(numbers), parts


def training_rows(raw: Sequence[Path], train: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a prepared train split, from the raw data.

    Args:
        raw: Parquet files of the raw data.
        train: Arrow stream of the train split.
    """
    numbers = np.unique(pa.ipc.open_stream(pa.memory_map(str(train))).read_all()["row"].to_numpy())
    start = 0
    for _, batch in raw_batches(raw, ROWS_PER_BATCH):
        own = numbers[(numbers >= start) & (numbers < start + len(batch))]
        yield from zip(own.tolist(), batch.take(pa.array(own - start)).to_pylist(), strict=True)
        start += len(batch)


def read_documents(path: Path) -> list[str]:
    """Read the documents of a file of evaluation tasks: the text of each line of .jsonl, item of .json or row of .csv.

    Raises:
        DataError: naming the file, and the line where there is one, if it cannot be read.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return [" ".join(row) for row in csv.reader(io.StringIO(content, newline=""))]
        if path.suffix == ".jsonl":
            return [" ".join(_strings(json.loads(line))) for line in content.split("\n") if line.strip()]
        items = json.loads(content)
    except (ValueError, csv.Error) as e:
        raise DataError(f"{path}: cannot be read as {path.suffix} for the check contamination: {e}") from e
    return [" ".join(_strings(item)) for item in (items if isinstance(items, list) else [items])]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
