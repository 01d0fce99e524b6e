"""Selects the rows of a dataset and assigns them to splits, before any text is tokenized."""

import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune_assets.config.schema import Data
from finetune_assets.data.cross_split import near_duplicates_across
from finetune_assets.data.dataset_statistics import SHOWN, Statistics
from finetune_assets.data.errors import DataError
from finetune_assets.data.learning import Learning
from finetune_assets.data.near_duplicates import THRESHOLD
from finetune_assets.data.processes import Processes
from finetune_assets.data.quality import hashed
from finetune_assets.data.raw_files import RawPart, raw_batches, rows_at
from finetune_assets.data.rows import Draw, RowKind, Split, draw, side_of
from finetune_assets.progress import ROWS as UNIT
from finetune_assets.progress import Progress

ROWS_PER_BATCH, DRAWN_PER_BATCH = 1_000, 2_500
KINDS = tuple(RowKind)
LONGEST_PROMPT = 80
"""Maximum length of a prompt that is named, in characters."""


class Rows(NamedTuple):
    """Data about all rows, collected before tokenization; a few bytes per row, so that millions fit in memory.

    Attributes:
        sources: Index of each row's part; shape (n,).
        replayed: Whether each row is of an earlier version, to be replayed; shape (n,).
        sides: `Draw.side` of each row; shape (n,).
        ranks: `Draw.rank` of each row; shape (n,).
        categories: Category of each row; shape (n,), equal texts share memory.
        kinds: Kind of each row, as an index into `KINDS`; shape (n,).
    """

    sources: NDArray[np.int64]
    replayed: NDArray[np.bool_]
    sides: NDArray[np.float64]
    ranks: NDArray[np.float64]
    categories: NDArray[np.object_]
    kinds: NDArray[np.int8]

    def side_of(self, row: int, data: Data) -> Split:
        return side_of(Draw(self.sides[row], self.ranks[row]), data)

    def in_train(self, data: Data) -> NDArray[np.bool_]:
        """Whether each row is in the train split, as `side_of` decides; shape (n,)."""
        return (self.sides >= data.gate_fraction) & (self.sides < 1 - data.val_fraction)


class _Draws(NamedTuple):
    """Draws of a batch: index of its part, and side, rank, category and kind of each row."""

    part: int
    sides: "array[float]"
    ranks: "array[float]"
    categories: list[str]
    kinds: NDArray[np.int8]


def _draw_batch(salt: str, batch: tuple[int, pa.RecordBatch]) -> _Draws:
    part, rows = batch
    columns = rows.select(["instruction", "context", "category"]).to_pydict()
    draws = [draw(*texts, salt) for texts in zip(columns["instruction"], columns["context"], strict=True)]
    categories = [sys.intern(category) for category in columns["category"]]
    sides, ranks = array("d", (each.side for each in draws)), array("d", (each.rank for each in draws))
    return _Draws(part, sides, ranks, categories, _kinds(rows))


def _kinds(rows: pa.RecordBatch) -> NDArray[np.int8]:
    """Kind of each row, from the columns `rejected` and `label` alone, as `kind_of` decides."""
    pairs, labelled = (rows.column(name).is_valid().to_numpy(zero_copy_only=False) for name in ("rejected", "label"))
    kinds = np.full(len(rows), KINDS.index(RowKind.INSTRUCTION), np.int8)
    kinds[labelled] = KINDS.index(RowKind.LABELLED)
    kinds[pairs] = KINDS.index(RowKind.PAIR)
    return kinds


def draw_rows(parts: Sequence[RawPart], salt: str, processes: Processes) -> Rows:
    """Draw side and rank of each row, in the order of the parts."""
    sides, ranks, categories, counts = array("d"), array("d"), list[str](), [0] * len(parts)
    kinds = [np.empty(0, np.int8)]
    columns = ["instruction", "context", "category", "rejected", "label"]
    batches = raw_batches([part.file for part in parts], DRAWN_PER_BATCH, columns)
    for batch in processes.map(partial(_draw_batch, salt), batches):
        counts[batch.part] += len(batch.sides)
        sides += batch.sides
        ranks += batch.ranks
        categories += map(sys.intern, batch.categories)
        kinds.append(batch.kinds)
    sources = np.repeat(np.arange(len(parts)), counts)
    replayed = np.array([part.replay for part in parts], np.bool_)[sources]
    numbers = np.array(sides), np.array(ranks), np.array(categories, object), np.concatenate(kinds)
    return Rows(sources, replayed, *numbers)


def select(
    rows: Rows, parts: Sequence[RawPart], data: Data, statistics: Statistics, learning: Learning
) -> NDArray[np.bool_]:
    """Select rows by kind, source, category and number; rows to replay are training rows that the other parts lack.

    Returns:
        Mask of the selected rows; shape (n,).

    Raises:
        DataError: if a category does not occur.
    """
    statistics.rows_read = int((~rows.replayed).sum())
    taken = _new_rows(rows, parts, data)
    _select_kinds(rows, taken, data, statistics, learning)
    if data.categories is not None:
        occurring = set(rows.categories)
        for name in data.categories:
            if name not in occurring:
                names = ", ".join(sorted(filter(None, occurring))) or "rows without a category only"
                raise DataError(f"data.categories: no row has category '{name}'; found {names}")
        others = ~np.isin(rows.categories, data.categories)
        statistics.rows_of_other_categories = int((taken & others & ~rows.replayed).sum())
        taken &= ~others
    for index, part in enumerate(parts):
        if part.max_rows is not None:
            _limit(taken, rows.sources == index, rows.ranks, part.max_rows)
    if data.num_samples is not None:
        statistics.rows_beyond_num_samples = _limit(taken, ~rows.replayed, rows.ranks, data.num_samples)
    return taken


def _select_kinds(rows: Rows, taken: NDArray[np.bool_], data: Data, statistics: Statistics, learning: Learning) -> None:
    """Leave out rows that the objective does not learn, and count them by kind."""
    in_train = rows.in_train(data)
    for number, kind in enumerate(KINDS):
        members = taken & (rows.kinds == number)
        for split, group in ((Split.TRAIN, in_train), (Split.VAL, ~in_train)):
            if not learning.trains_on(kind, split) and (left_out := members & group).any():
                others = statistics.rows_of_other_kinds
                others[kind] = others.get(kind, 0) + int((left_out & ~rows.replayed).sum())
                taken &= ~left_out


def _new_rows(rows: Rows, parts: Sequence[RawPart], data: Data) -> NDArray[np.bool_]:
    """All rows, except rows to replay that are held out, or that occur earlier, such as in a current version."""
    taken = ~rows.replayed | rows.in_train(data)
    if rows.replayed.any():
        columns = ["instruction", "context", "response", "messages", "rejected", "rejected_messages", "label"]
        hashes = [
            hashed(*map(str, row.values()))
            for _, batch in raw_batches([part.file for part in parts], 10_000, columns)
            for row in batch.to_pylist()
        ]
        _, first = np.unique(np.array(hashes, np.uint64), return_index=True)
        repeated = np.ones(len(hashes), np.bool_)
        repeated[first] = False
        taken &= ~(rows.replayed & repeated)
    return taken


def _limit(taken: NDArray[np.bool_], group: NDArray[np.bool_], ranks: NDArray[np.float64], most: int) -> int:
    """Keep at most so many taken rows of a group, those of lowest rank; returns the number of the others."""
    members = np.flatnonzero(taken & group)
    beyond = members[np.argsort(ranks[members], kind="stable")[most:]]
    taken[beyond] = False
    return len(beyond)


def describe_split(
    files: Sequence[Path], drawn: Rows, taken: NDArray[np.bool_], data: Data, statistics: Statistics
) -> None:
    """Count the rows of each split, and find the most frequent prompt."""
    taken = taken & ~drawn.replayed
    sides, in_train = drawn.sides[taken], drawn.in_train(data)[taken]
    gate = int((~in_train & (sides < data.gate_fraction)).sum())
    train = int(in_train.sum())
    statistics.drawn = {Split.TRAIN: train, Split.VAL: len(sides) - train - gate, Split.GATE: gate}
    if not len(sides):
        return
    values, counts = np.unique(sides, return_counts=True)
    row = int(np.flatnonzero(taken & (drawn.sides == values[counts.argmax()]))[0])
    (prompt,) = rows_at(files, [row], ["instruction", "context"])
    statistics.most_frequent_prompt = (prompt["instruction"] or prompt["context"])[:LONGEST_PROMPT]
    statistics.most_frequent_prompt_rows = int(counts.max())


def leave_out(
    files: Sequence[Path],
    drawn: Rows,
    taken: NDArray[np.bool_],
    data: Data,
    statistics: Statistics,
    processes: Processes,
) -> None:
    """Take no training row that repeats a held-out row, unless the settings keep them; then count them."""
    threshold, in_train = data.near_duplicate_threshold, drawn.in_train(data)
    if not (taken & ~in_train).any():
        return
    with Progress("comparing the splits", int(taken.sum()), UNIT) as progress:

        def batches(chosen: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
            for numbers, batch in taken_batches(files, chosen, ["instruction", "context", "response", "messages"]):
                progress.add(len(numbers))
                yield numbers, batch

        found = near_duplicates_across(
            batches(taken & ~in_train),
            batches(taken & in_train),
            THRESHOLD if threshold is None else threshold,
            processes,
        )
    if threshold is None:
        statistics.overlap, statistics.first_overlap = len(found.all_held_out), found.all_held_out[:SHOWN]
        return
    statistics.near_duplicates_left_out = len(found.train)
    statistics.first_left_out = list(zip(found.train, found.held_out, strict=True))[:SHOWN]
    taken[found.train] = False


def taken_batches(
    files: Sequence[Path], taken: NDArray[np.bool_], columns: list[str] | None = None
) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
    """The taken rows with their numbers, in batches."""
    start = 0
    for _, batch in raw_batches(files, ROWS_PER_BATCH, columns):
        wanted = np.flatnonzero(taken[start : start + len(batch)])
        if len(wanted):
            yield wanted + start, batch.take(pa.array(wanted))
        start += len(batch)
