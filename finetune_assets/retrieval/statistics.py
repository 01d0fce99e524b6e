"""What passages the rows of a tokenized dataset have: counts by split, and rows with unseen passages."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune_assets.data.rows import Split

COLUMNS = ("passages", "golden", "dropped_passages")


def passage_statistics(dataset: Path) -> dict[str, dict[str, int]]:
    """Counts of each split of a tokenized dataset.

    `golden_rows` have a golden passage among their passages. The other rows have none because they were drawn so or it
    was not retrieved or did not fit (`without_golden_rows`), or because it is not in the documents
    (`unknown_golden_rows`). Passages that did not fit are counted as `dropped_passages` of `shortened_rows`.
    `unseen_passage_rows` are held-out rows whose golden passages are those of no training row.
    """
    return {str(split): _counts(dataset, split) for split in Split}


def _counts(dataset: Path, split: Split) -> dict[str, int]:
    table = _columns(dataset, split)
    shown, known = _has_golden(table), pa.compute.list_value_length(table["golden"]).to_numpy() > 0
    dropped = table["dropped_passages"].to_numpy()
    counts = {
        "golden_rows": shown.sum(),
        "without_golden_rows": (known & ~shown).sum(),
        "unknown_golden_rows": (~known).sum(),
        "shortened_rows": (dropped > 0).sum(),
        "dropped_passages": dropped.sum(),
    }
    if split is not Split.TRAIN:
        counts["unseen_passage_rows"] = unseen_passages(dataset, split).sum()
    return {name: int(count) for name, count in counts.items()}


def unseen_passages(dataset: Path, split: str) -> NDArray[np.bool_]:
    """Mask of the rows of a split with golden passages that are the golden passages of no training row."""
    seen = {passage for golden in _golden(dataset, Split.TRAIN) for passage in golden}
    return np.array([bool(golden) and seen.isdisjoint(golden) for golden in _golden(dataset, split)], np.bool_)


def shows_golden(rows: Iterable[Any]) -> NDArray[np.bool_]:
    """Mask of the rows with a golden passage among their passages; a row without passages has none."""
    return np.array([isinstance(row, dict) and not {*row["golden"]}.isdisjoint(row["passages"]) for row in rows], bool)


def _has_golden(table: pa.Table) -> NDArray[np.bool_]:
    return shows_golden(table.select(["passages", "golden"]).to_pylist())


def _golden(dataset: Path, split: str) -> list[list[str]]:
    return _columns(dataset, split)["golden"].to_pylist()  # type: ignore[no-any-return]


def _columns(dataset: Path, split: str) -> pa.Table:
    with pa.ipc.open_stream(pa.memory_map(str(dataset / f"{split}.arrow"))) as reader:
        return reader.read_all().select(COLUMNS)
