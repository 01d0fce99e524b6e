"""Converts raw Parquet rows to training-ready Arrow files, in one pass over the text and bounded memory.

The output folder contains `train.arrow`, `val.arrow` and `gate.arrow` (Arrow streams that `datasets.Dataset.from_file`
can open too) and, with packing, `packs.arrow`: the train examples of each packed sequence.
"""

import sys
from array import array
from collections import Counter
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
from finetune_assets.data.errors import DataError
from finetune_assets.data.packing import pack
from finetune_assets.data.quality import SHOWN, folded, hashed
from finetune_assets.data.rows import Draw, Row, Split, draw, side_of
from finetune_assets.data.tokenization import IGNORED, Encoder, TokenizedRows
from finetune_assets.progress import ROWS as UNIT
from finetune_assets.progress import Progress

ROWS_PER_BATCH = 1_000
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
        prompts: Hash of each row's folded prompt; shape (n,).
        categories: Category of each row; shape (n,), equal texts share memory.
    """

    sides: NDArray[np.float64]
    ranks: NDArray[np.float64]
    prompts: NDArray[np.uint64]
    categories: NDArray[np.object_]

    def side_of(self, row: int, data: Data) -> Split:
        return side_of(Draw(self.sides[row], self.ranks[row]), data)


@dataclass
class Statistics:
    """Statistics of a prepared dataset. Token counts are of the train split unless named otherwise.

    `refused` rows cannot be rendered with the experiment's template; `first_refused` names the first of them and the
    reason. `overlap` counts held-out rows with a prompt that is also in the train split, up to case, spaces and
    punctuation. Rows are named by their numbers in the raw data, from 0.
    """

    rows_read: int = 0
    rows_of_other_categories: int = 0
    rows_beyond_num_samples: int = 0
    examples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Split, 0))
    refused: int = 0
    first_refused: str = ""
    omitted: dict[str, int] = field(default_factory=dict)
    """Number of rows by the part that the chat template does not render although nothing to learn is lost."""
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
    lengths = _write_examples(rows, Encoder(tokenizer, data), drawn, taken, data, statistics, out)
    _check_not_empty(statistics, data)
    _describe_lengths(lengths, statistics)
    _write_packs(lengths, data, statistics, out)
    return statistics


def _draw_rows(rows: Path, salt: str) -> Rows:
    sides, ranks, prompts, categories = array("d"), array("d"), array("Q"), list[str]()
    for batch in pq.ParquetFile(rows).iter_batches(10_000, columns=["instruction", "context", "category"]):
        columns = batch.to_pydict()
        for instruction, context in zip(columns["instruction"], columns["context"], strict=True):
            side, rank = draw(instruction, context, salt)
            sides.append(side)
            ranks.append(rank)
            prompts.append(hashed(folded(instruction), folded(context)))
        categories += map(sys.intern, columns["category"])
    return Rows(np.array(sides), np.array(ranks), np.array(prompts), np.array(categories, object))


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
    written: dict[Split, list[NDArray[np.int64]]] = {split: [] for split in Split}
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
            statistics.omitted = dict(examples.omitted + Counter(statistics.omitted))
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
                written[split].append(indices[kept])
                if split is Split.TRAIN:
                    lengths.append(examples.lengths[kept])
                    statistics.truncated += int(examples.truncated[kept].sum())
                    _name_first(statistics.first_truncated, indices[kept][examples.truncated[kept]])
                    statistics.labelled_tokens += int(labelled[kept].sum())
    _count_overlap({split: _joined(rows) for split, rows in written.items()}, drawn, statistics)
    return _joined(lengths)


def _joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _name_first(names: list[int], rows: NDArray[np.int64]) -> None:
    names += map(int, rows[: SHOWN - len(names)])


def _count_overlap(written: dict[Split, NDArray[np.int64]], drawn: Rows, statistics: Statistics) -> None:
    held_out = np.sort(np.concatenate([written[Split.VAL], written[Split.GATE]]))
    both = held_out[np.isin(drawn.prompts[held_out], drawn.prompts[written[Split.TRAIN]])]
    statistics.overlap = len(both)
    _name_first(statistics.first_overlap, both)


def _count_refused(examples: TokenizedRows, chosen: NDArray[np.int64], statistics: Statistics) -> None:
    if examples.refused and not statistics.refused:
        row, reason = examples.refused[0]
        statistics.first_refused = f"row {chosen[row]} of dolly_raw: {reason}"
    statistics.refused += len(examples.refused)


def _taken_rows(rows: Path, taken: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], list[Row]]]:
    start = 0
    for batch in pq.ParquetFile(rows).iter_batches(ROWS_PER_BATCH):
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
    counts = f"{statistics.rows_read} rows gave {dict(left)} examples, {statistics.without_label} without a label"
    if statistics.refused:
        counts += f", {statistics.refused} refused by the template ({statistics.first_refused})"
    if not left[Split.TRAIN]:
        raise DataError(f"no training examples: {counts}; use more rows or raise data.tokenization.cutoff_len")
    if not left[Split.VAL] and data.val_fraction > 0:
        raise DataError(f"no validation examples: {counts}; use more rows, raise data.val_fraction, or set it to 0")


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
