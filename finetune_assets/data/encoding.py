"""Encodes the selected rows as examples, batch by batch, in one or several processes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune_assets.config.schema import Data
from finetune_assets.data.errors import RefusedRow
from finetune_assets.data.learning import SFT, Learning
from finetune_assets.data.processes import Processes
from finetune_assets.data.rows import Draw, Row, RowKind, Split, kind_of, rejected_side, side_of
from finetune_assets.data.selection import Rows, taken_batches
from finetune_assets.data.tokenization import IGNORED, Encoder, TokenizedRows

EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), metadata={"doc": "tokens of prompt, response and end"}),
        pa.field("labels", pa.list_(pa.int32()), metadata={"doc": "the same, or -100 where nothing is learned"}),
        pa.field("prompt_length", pa.int32(), metadata={"doc": "tokens before the last response"}),
        pa.field("row", pa.int64(), metadata={"doc": "index of the row in the raw data"}),
        pa.field("category", pa.string(), metadata={"doc": "category of the row"}),
    ]
)
SOURCE = pa.field("source", pa.string(), metadata={"doc": "name of the row's source; absent with a single source"})
PASSAGES = (
    pa.field("passages", pa.list_(pa.string()), metadata={"doc": "ids of the passages of the context, in order"}),
    pa.field("golden", pa.list_(pa.string()), metadata={"doc": "ids of the row's golden passages in the documents"}),
    pa.field("dropped_passages", pa.int32(), metadata={"doc": "passages that did not fit"}),
)
"""Columns of rows with passages; each is a key of the row."""
JUDGEMENT = (
    pa.field("pair", pa.int64(), metadata={"doc": "of both answers of a pair, index of its row; null in others"}),
    pa.field("chosen", pa.bool_(), metadata={"doc": "whether this is the chosen answer of the pair; null in others"}),
    pa.field(
        "desirable",
        pa.bool_(),
        metadata={"doc": "whether the answer is good: of labelled answers and, with kto, of pairs; null in others"},
    ),
)
"""Columns of datasets with judged answers. The two examples of a pair are adjacent, the chosen answer first."""
Contexts = Callable[[list[Row], Sequence[Split]], list[Row | RefusedRow]]
"""Replaces the contexts of rows of known splits, and adds the keys of `PASSAGES`; it can be pickled."""


class TrainExamples(NamedTuple):
    """Numbers of the train examples, each of shape (n,).

    Attributes:
        rows: Index of each example's row.
        lengths: Number of tokens.
        labelled: Number of labelled tokens.
        truncated: Whether the example is truncated at `cutoff_len`.
    """

    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labelled: NDArray[np.int64]
    truncated: NDArray[np.bool_]

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> "TrainExamples":
        return TrainExamples(self.rows[chosen], self.lengths[chosen], self.labelled[chosen], self.truncated[chosen])

    @staticmethod
    def joined(parts: Sequence["TrainExamples"]) -> "TrainExamples":
        none = np.empty(0, np.int64)
        parts = [TrainExamples(none, none, none, np.empty(0, np.bool_)), *parts]
        return TrainExamples(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.labelled for part in parts]),
            np.concatenate([part.truncated for part in parts]),
        )


class RowBatch(NamedTuple):
    """Rows to encode.

    Attributes:
        rows: The rows, of `RAW_SCHEMA`.
        numbers: Number of each row; shape (n,).
        sides: `Draw.side` of each row; shape (n,).
        sources: Name of each row's source; shape (n,). None with a single source.
    """

    rows: pa.RecordBatch
    numbers: NDArray[np.int64]
    sides: NDArray[np.float64]
    sources: NDArray[np.object_] | None


class EncodedBatch(NamedTuple):
    """Examples of a batch of rows.

    Attributes:
        rows: Number of rows.
        examples: Examples of each split, without those without a label; a split without any is absent.
        train: Numbers of the train examples.
        without_label: Number of each row without a label.
        refused: Number of rows that the template cannot render.
        first_refused: The first of them and the reason; empty without any.
        omitted: Number of rows by the part that the chat template does not render although nothing to learn is lost.
    """

    rows: int
    examples: dict[Split, pa.RecordBatch]
    train: TrainExamples
    without_label: NDArray[np.int64]
    refused: int
    first_refused: str
    omitted: Counter[str]


def encoded_batches(
    files: Sequence[Path],
    names: Sequence[str] | None,
    encoder: Encoder,
    drawn: Rows,
    taken: NDArray[np.bool_],
    data: Data,
    processes: Processes,
    contexts: Contexts | None = None,
    learning: Learning = SFT,
) -> Iterator[EncodedBatch]:
    """Encode the taken rows.

    Args:
        files: Parquet files of the raw data.
        names: Name of each file's source; None with a single source.
        encoder: Encoder of the experiment.
        drawn: Draws of all rows.
        taken: Mask of the rows to encode; shape (n,).
        data: Data settings of the experiment.
        processes: Processes that compute.
        contexts: Replaces the contexts of the rows.
        learning: What the training learns from.
    """
    of_sources = None if names is None else np.array(names, object)
    batches = (
        RowBatch(
            rows, numbers, drawn.sides[numbers], None if of_sources is None else of_sources[drawn.sources[numbers]]
        )
        for numbers, rows in taken_batches(files, taken)
    )
    yield from processes.map(partial(encode_batch, encoder, data, contexts=contexts, learning=learning), batches)


def example_schema(has_sources: bool, has_passages: bool = False, has_judgements: bool = False) -> pa.Schema:
    """Schema of the examples; `source` is a column if there are several."""
    columns = [*EXAMPLE_SCHEMA, *([SOURCE] if has_sources else []), *(PASSAGES if has_passages else [])]
    return pa.schema([*columns, *(JUDGEMENT if has_judgements else [])])


def encode_batch(
    encoder: Encoder, data: Data, batch: RowBatch, contexts: Contexts | None = None, learning: Learning = SFT
) -> EncodedBatch:
    """Encode a batch of rows; the two answers of a pair are two examples."""
    rows: list[Row | RefusedRow] = batch.rows.to_pylist()
    splits = [side_of(Draw(side, 0.0), data) for side in batch.sides.tolist()]
    if contexts:
        rows = contexts(batch.rows.to_pylist(), splits)
    answers = _answers(rows)
    encoded = encoder.encode([answer.row for answer in answers])
    refused = {answers[each.row].of: each.reason for each in reversed(encoded.refused)}
    first = min(refused, default=0)
    reason = f"row {batch.numbers[first]} of dolly_raw: {refused[first]}" if refused else ""
    if not len(encoded.rows):
        none = np.empty(0, np.int64)
        return EncodedBatch(len(batch.rows), {}, TrainExamples.joined([]), none, len(refused), reason, encoded.omitted)
    taken = [answers[index] for index in encoded.rows]
    owners = np.array([answer.of for answer in taken])
    numbers, labelled = batch.numbers[owners], _labelled_tokens(encoded)
    usable = (labelled > 0) & ~np.isin(owners, [*refused]) & ~_equal_when_truncated(encoded, taken)
    usable &= ~np.isin(owners, owners[~usable])  # a pair is used whole, or not at all
    sides = np.array([splits[owner] for owner in owners])
    kept = {split: np.flatnonzero((sides == split) & usable) for split in Split}
    columns = [*_columns(encoded, numbers), batch.rows.column("category").take(pa.array(owners))]
    if batch.sources is not None:
        columns.append(pa.array(batch.sources[owners], pa.string()))
    if contexts:
        columns += [pa.array([_value(rows[owner], field.name) for owner in owners], field.type) for field in PASSAGES]
    if learning.judged:
        columns += _judgements(taken, numbers, learning)
    schema = example_schema(batch.sources is not None, contexts is not None, learning.judged)
    examples = pa.RecordBatch.from_arrays(columns, schema=schema)
    return EncodedBatch(
        len(batch.rows),
        {split: examples.take(pa.array(rows)) for split, rows in kept.items() if len(rows)},
        TrainExamples(numbers, encoded.lengths, labelled, encoded.truncated).take(kept[Split.TRAIN]),
        np.unique(numbers[~usable & ~np.isin(owners, [*refused])]),
        len(refused),
        reason,
        encoded.omitted,
    )


class _Answer(NamedTuple):
    """An answer to encode.

    Attributes:
        of: Index of its row in the batch.
        row: The row with this answer, or its refusal.
        chosen: Whether it is the chosen answer of a pair; None for other rows.
    """

    of: int
    row: Row | RefusedRow
    chosen: bool | None = None


def _answers(rows: Sequence[Row | RefusedRow]) -> list[_Answer]:
    answers = []
    for index, row in enumerate(rows):
        if isinstance(row, RefusedRow) or kind_of(row) is not RowKind.PAIR:
            answers.append(_Answer(index, row))
        else:
            answers += [_Answer(index, row, True), _Answer(index, rejected_side(row), False)]
    return answers


def _judgements(answers: Sequence[_Answer], numbers: NDArray[np.int64], learning: Learning) -> list[pa.Array]:
    """The columns `JUDGEMENT`."""
    chosen = [answer.chosen for answer in answers]
    labels = [None if isinstance(answer.row, RefusedRow) else answer.row["label"] for answer in answers]
    if not learning.pairs:
        labels = [label if of_pair is None else of_pair for label, of_pair in zip(labels, chosen, strict=True)]
    pairs = [None if of_pair is None else number for number, of_pair in zip(numbers.tolist(), chosen, strict=True)]
    values = (pairs, chosen, labels)
    return [pa.array(column, field.type) for column, field in zip(values, JUDGEMENT, strict=True)]


def _equal_when_truncated(encoded: TokenizedRows, answers: Sequence[_Answer]) -> NDArray[np.bool_]:
    """Whether each example is an answer of a pair whose answers differ only beyond `cutoff_len`; shape (n,)."""
    ends = np.cumsum(encoded.lengths)
    equal = np.zeros(len(ends), np.bool_)
    for example in np.flatnonzero(encoded.truncated[1:] & encoded.truncated[:-1]).tolist():
        ours, theirs = (slice(ends[i] - encoded.lengths[i], ends[i]) for i in (example, example + 1))
        same = answers[example].of == answers[example + 1].of
        if same and np.array_equal(encoded.input_ids[ours], encoded.input_ids[theirs]):
            equal[example : example + 2] = True
    return equal


def _value(row: Row | RefusedRow, name: str) -> Any:
    assert not isinstance(row, RefusedRow), "a refused row has no example"
    return row[name]


def _columns(examples: TokenizedRows, numbers: NDArray[np.int64]) -> list[pa.Array]:
    offsets = pa.array(np.concatenate([[0], np.cumsum(examples.lengths)]), pa.int32())
    return [
        pa.ListArray.from_arrays(offsets, pa.array(examples.input_ids)),
        pa.ListArray.from_arrays(offsets, pa.array(examples.labels)),
        pa.array(examples.prompt_lengths),
        pa.array(numbers),
    ]


def _labelled_tokens(examples: TokenizedRows) -> NDArray[np.int64]:
    """Number of labelled tokens of each example, without its first token, which nothing predicts. Shape (n,)."""
    starts = np.cumsum(examples.lengths) - examples.lengths
    learned = (examples.labels != IGNORED).astype(np.int64)
    learned[starts[examples.lengths > 0]] = 0
    return np.add.reduceat(learned, starts)
