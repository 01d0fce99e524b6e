"""Converts raw Parquet rows to training-ready Arrow files, in one pass over the text and bounded memory.

The output folder contains `train.arrow`, `val.arrow` and `gate.arrow` (Arrow streams that `datasets.Dataset.from_file`
can open too) and, with packing, `packs.arrow`: the train examples of each packed sequence.
"""

import sys
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from finetune_assets.config.schema import Data
from finetune_assets.data.cross_split import near_duplicates_across
from finetune_assets.data.errors import DataError
from finetune_assets.data.near_duplicates import THRESHOLD
from finetune_assets.data.packing import pack
from finetune_assets.data.quality import SHOWN, rows_by_number
from finetune_assets.data.rows import Draw, Row, Split, draw, side_of
from finetune_assets.data.tokenization import IGNORED, Encoder, TokenizedRows
from finetune_assets.progress import ROWS as UNIT
from finetune_assets.progress import Progress

ROWS_PER_BATCH = 1_000
LONGEST_PROMPT = 80
"""Maximum length of a prompt that is named, in characters."""
FREQUENT = 0.2
"""A prompt with more than this fraction of the rows explains an empty split."""
LENGTH_BINS, FILL_BINS = 40, 20
"""Number of bins of the histograms of example lengths and of packed sequences' fill."""
EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), metadata={"doc": "tokens of prompt, response and end"}),
        pa.field("labels", pa.list_(pa.int32()), metadata={"doc": "the same, or -100 where nothing is learned"}),
        pa.field("prompt_length", pa.int32(), metadata={"doc": "tokens before the last response"}),
        pa.field("row", pa.int64(), metadata={"doc": "index of the row in the raw data"}),
        pa.field("category", pa.string(), metadata={"doc": "category of the row"}),
    ]
)
PACK_SCHEMA = pa.schema([pa.field("examples", pa.list_(pa.int32()), metadata={"doc": "indices into train.arrow"})])


class Rows(NamedTuple):
    """Data about all rows, collected before tokenization; a few bytes per row, so that millions fit in memory.

    Attributes:
        sides: `Draw.side` of each row; shape (n,).
        ranks: `Draw.rank` of each row; shape (n,).
        categories: Category of each row; shape (n,), equal texts share memory.
    """

    sides: NDArray[np.float64]
    ranks: NDArray[np.float64]
    categories: NDArray[np.object_]

    def side_of(self, row: int, data: Data) -> Split:
        return side_of(Draw(self.sides[row], self.ranks[row]), data)

    def in_train(self, data: Data) -> NDArray[np.bool_]:
        """Whether each row is in the train split, as `side_of` decides; shape (n,)."""
        return (self.sides >= data.gate_fraction) & (self.sides < 1 - data.val_fraction)


@dataclass
class Statistics:
    """Statistics of a prepared dataset. Token counts are of the train split unless named otherwise.

    `refused` rows cannot be rendered with the experiment's template; `first_refused` names the first of them and the
    reason. `near_duplicates_left_out` counts training rows that are left out because they repeat a held-out row, and
    `first_left_out` names the first of them, each with that row. `overlap` counts held-out rows that a training row
    repeats (`cross_split`). `drawn` counts the chosen rows by split, before any is left out;
    `most_frequent_prompt_rows` of them share one prompt. Rows are named by their numbers in the raw data, from 0.
    """

    rows_read: int = 0
    rows_of_other_categories: int = 0
    rows_beyond_num_samples: int = 0
    drawn: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Split, 0))
    most_frequent_prompt: str = ""
    most_frequent_prompt_rows: int = 0
    near_duplicates_left_out: int = 0
    first_left_out: list[tuple[int, int]] = field(default_factory=list)
    examples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Split, 0))
    refused: int = 0
    first_refused: str = ""
    without_label: int = 0
    first_without_label: list[int] = field(default_factory=list)
    truncated: int = 0
    first_truncated: list[int] = field(default_factory=list)
    overlap: int = 0
    first_overlap: list[int] = field(default_factory=list)
    tokens: int = 0
    labelled_tokens: int = 0
    length_quantiles: dict[str, int] = field(default_factory=dict)
    sequences: int = 0
    fill: float = 1.0
    """Fraction of the sequences' positions that hold a token."""
    length_histogram: dict[str, Any] = field(default_factory=dict)
    """`width` of a bin in tokens, and `counts` of the train examples in each bin, starting at 0."""
    fill_histogram: list[int] = field(default_factory=list)
    """Number of packed sequences by fill fraction, in `FILL_BINS` bins of equal width from 0 to 1."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def prepare_dataset(
    rows: Path, tokenizer: PreTrainedTokenizerBase, data: Data, split_salt: str, out: Path
) -> Statistics:
    """Select, split, render, tokenize, label and pack the rows of a Parquet file of `RAW_SCHEMA`.

    Raises:
        DataError: if a category does not occur, or no train or no validation example is left.
    """
    statistics = Statistics()
    drawn = _draw_rows(rows, split_salt)
    taken = _select(drawn, data, statistics)
    _describe_split(rows, drawn, taken, data, statistics)
    _leave_out(rows, drawn, taken, data, statistics)
    lengths = _write_examples(rows, Encoder(tokenizer, data), drawn, taken, data, statistics, out)
    _check_not_empty(statistics, data)
    _describe_lengths(lengths, statistics)
    _write_packs(lengths, data, statistics, out)
    return statistics


def _draw_rows(rows: Path, salt: str) -> Rows:
    sides, ranks, categories = array("d"), array("d"), list[str]()
    for batch in pq.ParquetFile(rows).iter_batches(10_000, columns=["instruction", "context", "category"]):
        columns = batch.to_pydict()
        for instruction, context in zip(columns["instruction"], columns["context"], strict=True):
            side, rank = draw(instruction, context, salt)
            sides.append(side)
            ranks.append(rank)
        categories += map(sys.intern, columns["category"])
    return Rows(np.array(sides), np.array(ranks), np.array(categories, object))


def _select(rows: Rows, data: Data, statistics: Statistics) -> NDArray[np.bool_]:
    count = statistics.rows_read = len(rows.sides)
    taken = np.ones(count, np.bool_)
    if data.categories is not None:
        occurring = set(rows.categories)
        for name in data.categories:
            if name not in occurring:
                names = ", ".join(sorted(filter(None, occurring))) or "rows without a category only"
                raise DataError(f"data.categories: no row has category '{name}'; found {names}")
        taken &= np.isin(rows.categories, data.categories)
        statistics.rows_of_other_categories = int((~taken).sum())
    if data.num_samples is not None and taken.sum() > data.num_samples:
        ranks = np.where(taken, rows.ranks, 1.0)
        beyond = np.argsort(ranks, kind="stable")[data.num_samples :]
        statistics.rows_beyond_num_samples = int(taken.sum()) - data.num_samples
        taken[beyond] = False
    return taken


def _describe_split(rows: Path, drawn: Rows, taken: NDArray[np.bool_], data: Data, statistics: Statistics) -> None:
    sides, in_train = drawn.sides[taken], drawn.in_train(data)[taken]
    gate = int((~in_train & (sides < data.gate_fraction)).sum())
    train = int(in_train.sum())
    statistics.drawn = {Split.TRAIN: train, Split.VAL: len(sides) - train - gate, Split.GATE: gate}
    if not len(sides):
        return
    values, counts = np.unique(sides, return_counts=True)
    row = int(np.flatnonzero(taken & (drawn.sides == values[counts.argmax()]))[0])
    batches = pq.ParquetFile(rows).iter_batches(ROWS_PER_BATCH, columns=["instruction", "context"])
    prompt = rows_by_number(batches, {row})[row]
    statistics.most_frequent_prompt = (prompt["instruction"] or prompt["context"])[:LONGEST_PROMPT]
    statistics.most_frequent_prompt_rows = int(counts.max())


def _leave_out(rows: Path, drawn: Rows, taken: NDArray[np.bool_], data: Data, statistics: Statistics) -> None:
    """Take no training row that repeats a held-out row, unless the settings keep them; then count them."""
    threshold, in_train = data.near_duplicate_threshold, drawn.in_train(data)
    if not (taken & ~in_train).any():
        return
    with Progress("comparing the splits", int(taken.sum()), UNIT) as progress:

        def batches(chosen: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], list[Row]]]:
            for numbers, batch in _taken_rows(rows, chosen, ["instruction", "context", "response", "messages"]):
                progress.add(len(numbers))
                yield numbers, batch

        found = near_duplicates_across(
            batches(taken & ~in_train), batches(taken & in_train), THRESHOLD if threshold is None else threshold
        )
    if threshold is None:
        statistics.overlap, statistics.first_overlap = len(found.all_held_out), found.all_held_out[:SHOWN]
        return
    statistics.near_duplicates_left_out = len(found.train)
    statistics.first_left_out = list(zip(found.train, found.held_out, strict=True))[:SHOWN]
    taken[found.train] = False


def _write_examples(
    rows: Path,
    encoder: Encoder,
    drawn: Rows,
    taken: NDArray[np.bool_],
    data: Data,
    statistics: Statistics,
    out: Path,
) -> NDArray[np.int64]:
    """Write one Arrow stream per split.

    Returns:
        Number of tokens of each train example; shape (n,).
    """
    lengths: list[NDArray[np.int64]] = []
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(pa.ipc.new_stream(str(out / f"{split}.arrow"), EXAMPLE_SCHEMA))
            for split in Split
        }
        progress = stack.enter_context(Progress("tokenizing", int(taken.sum()), UNIT))
        for chosen, batch in _taken_rows(rows, taken):
            progress.add(len(chosen))
            examples = encoder.encode(batch)
            _count_refused(examples, chosen, statistics)
            if not len(examples.rows):
                continue
            indices = chosen[examples.rows]
            sides = np.array([drawn.side_of(i, data) for i in indices])
            columns = _columns(examples, indices, drawn.categories[indices])
            labelled = _labelled_tokens(examples)
            statistics.without_label += int((labelled == 0).sum())
            _name_first(statistics.first_without_label, indices[labelled == 0])
            for split, writer in writers.items():
                kept = np.flatnonzero((sides == split) & (labelled > 0))
                if len(kept):
                    writer.write_batch(columns.take(pa.array(kept)))
                statistics.examples[split] += len(kept)
                if split is Split.TRAIN:
                    lengths.append(examples.lengths[kept])
                    statistics.truncated += int(examples.truncated[kept].sum())
                    _name_first(statistics.first_truncated, indices[kept][examples.truncated[kept]])
                    statistics.labelled_tokens += int(labelled[kept].sum())
    return np.concatenate(lengths) if lengths else np.empty(0, np.int64)


def _name_first(names: list[int], rows: NDArray[np.int64]) -> None:
    names += map(int, rows[: SHOWN - len(names)])


def _count_refused(examples: TokenizedRows, chosen: NDArray[np.int64], statistics: Statistics) -> None:
    if examples.refused and not statistics.refused:
        row, reason = examples.refused[0]
        statistics.first_refused = f"row {chosen[row]} of dolly_raw: {reason}"
    statistics.refused += len(examples.refused)


def _taken_rows(
    rows: Path, taken: NDArray[np.bool_], columns: list[str] | None = None
) -> Iterator[tuple[NDArray[np.int64], list[Row]]]:
    start = 0
    for batch in pq.ParquetFile(rows).iter_batches(ROWS_PER_BATCH, columns=columns):
        wanted = np.flatnonzero(taken[start : start + len(batch)])
        if len(wanted):
            yield wanted + start, batch.take(pa.array(wanted)).to_pylist()
        start += len(batch)


def _columns(examples: TokenizedRows, indices: NDArray[np.int64], categories: NDArray[np.object_]) -> pa.RecordBatch:
    offsets = pa.array(np.concatenate([[0], np.cumsum(examples.lengths)]), pa.int32())
    return pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(offsets, pa.array(examples.input_ids)),
            pa.ListArray.from_arrays(offsets, pa.array(examples.labels)),
            pa.array(examples.prompt_lengths),
            pa.array(indices),
            pa.array(categories, pa.string()),
        ],
        schema=EXAMPLE_SCHEMA,
    )


def _labelled_tokens(examples: TokenizedRows) -> NDArray[np.int64]:
    """Number of labelled tokens of each example, without its first token, which nothing predicts. Shape (n,)."""
    starts = np.cumsum(examples.lengths) - examples.lengths
    learned = (examples.labels != IGNORED).astype(np.int64)
    learned[starts[examples.lengths > 0]] = 0
    return np.add.reduceat(learned, starts)


def _check_not_empty(statistics: Statistics, data: Data) -> None:
    left = statistics.examples
    written = ", ".join(f"{count} {split}" for split, count in left.items())
    counts = f"{statistics.rows_read} rows gave {written} examples, {statistics.without_label} without a label"
    if statistics.refused:
        counts += f", {statistics.refused} refused by the template ({statistics.first_refused})"
    if statistics.near_duplicates_left_out:
        counts += (
            f", {statistics.near_duplicates_left_out} near-duplicates of held-out rows left out "
            f"(data.near_duplicate_threshold = {data.near_duplicate_threshold:g})"
        )
    for split, needed in ((Split.TRAIN, True), (Split.VAL, data.val_fraction > 0)):
        if needed and not left[split]:
            name = {Split.TRAIN: "training", Split.VAL: "validation"}[split]
            raise DataError(f"no {name} examples: {counts}; {_remedy(split, statistics)}")


def _remedy(split: Split, statistics: Statistics) -> str:
    rows, same = sum(statistics.drawn.values()), statistics.most_frequent_prompt_rows
    if same > FREQUENT * rows and same > 1:
        return (
            f"{same} of {rows} rows ({same / rows:.0%}) have the same prompt, {statistics.most_frequent_prompt!r}, and "
            "rows with the same prompt (of a conversation: system turn and first user turn) are in one split; add rows "
            "with other prompts"
        )
    if split is Split.TRAIN:
        return "use more rows or raise data.tokenization.cutoff_len"
    return "use more rows, raise data.val_fraction, or set it to 0"


def _describe_lengths(lengths: NDArray[np.int64], statistics: Statistics) -> None:
    statistics.tokens = int(lengths.sum())
    for name, share in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}.items():
        statistics.length_quantiles[name] = int(np.quantile(lengths, share, method="nearest"))
    width = -(-(statistics.length_quantiles["max"] + 1) // LENGTH_BINS)
    statistics.length_histogram = {"width": width, "counts": np.bincount(lengths // width).tolist()}


def _write_packs(lengths: NDArray[np.int64], data: Data, statistics: Statistics, out: Path) -> None:
    statistics.sequences = len(lengths)
    if not data.tokenization.packing:
        return
    capacity = data.tokenization.packing_length or data.tokenization.cutoff_len
    packs = pack(lengths, capacity)
    statistics.sequences = len(packs)
    statistics.fill = round(statistics.tokens / (capacity * len(packs)), 4)
    starts = np.cumsum([0, *map(len, packs[:-1])])
    filled = np.add.reduceat(lengths[np.fromiter(chain.from_iterable(packs), np.int64, len(lengths))], starts)
    bins = np.minimum(filled * FILL_BINS // capacity, FILL_BINS - 1)
    statistics.fill_histogram = np.bincount(bins, minlength=FILL_BINS).tolist()
    with pa.ipc.new_stream(str(out / "packs.arrow"), PACK_SCHEMA) as writer:
        writer.write_table(pa.table({"examples": pa.array(packs, pa.list_(pa.int32()))}, schema=PACK_SCHEMA))
