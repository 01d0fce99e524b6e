"""Converts raw Parquet rows to training-ready Arrow files, in one pass over the text and bounded memory.

The output folder contains `train.arrow`, `val.arrow` and `gate.arrow` (Arrow streams that `datasets.Dataset.from_file`
can open too) and, with packing, `packs.arrow`: the train examples of each packed sequence.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from finetune_assets.config.schema import Data
from finetune_assets.data.dataset_statistics import FILL_BINS, LENGTH_BINS, Statistics, name_first
from finetune_assets.data.errors import DataError
from finetune_assets.data.mixture import choose, choose_replayed
from finetune_assets.data.packing import pack
from finetune_assets.data.raw_files import RawPart
from finetune_assets.data.rows import Split
from finetune_assets.data.selection import Rows, describe_split, draw_rows, leave_out, select, taken_rows
from finetune_assets.data.tokenization import IGNORED, Encoder, TokenizedRows
from finetune_assets.progress import ROWS as UNIT
from finetune_assets.progress import Progress

logger = logging.getLogger(__name__)
FREQUENT = 0.2
"""A prompt with more than this fraction of the rows explains an empty split. It is logged if more rows of a source than
this are left out."""
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
PACK_SCHEMA = pa.schema([pa.field("examples", pa.list_(pa.int32()), metadata={"doc": "indices into train.arrow"})])


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


def prepare_dataset(
    rows: Path | Sequence[RawPart], tokenizer: PreTrainedTokenizerBase, data: Data, split_salt: str, out: Path
) -> Statistics:
    """Select, split, render, tokenize, label, mix and pack rows.

    Args:
        rows: A Parquet file of `RAW_SCHEMA`, or the versions of several sources.
        tokenizer: Tokenizer of the base model.
        data: Data settings of the experiment.
        split_salt: Salt of the content hashes.
        out: Folder to write to.

    Raises:
        DataError: if a category does not occur, or no train or no validation example is left.
    """
    parts = [RawPart("", rows)] if isinstance(rows, Path) else [*rows]
    files = [part.file for part in parts]
    statistics = Statistics()
    drawn = draw_rows(parts, split_salt)
    taken = select(drawn, parts, data, statistics)
    describe_split(files, drawn, taken, data, statistics)
    leave_out(files, drawn, taken, data, statistics)
    train = _write_examples(parts, Encoder(tokenizer, data), drawn, taken, data, statistics, out)
    train = _mix(train, parts, drawn, data, statistics, out)
    _describe_train(train, drawn, statistics)
    _check_not_empty(statistics, data)
    _describe_lengths(train.lengths, statistics)
    _write_packs(train.lengths, data, statistics, out)
    return statistics


def _write_examples(
    parts: Sequence[RawPart],
    encoder: Encoder,
    drawn: Rows,
    taken: NDArray[np.bool_],
    data: Data,
    statistics: Statistics,
    out: Path,
) -> TrainExamples:
    """Write one Arrow stream per split."""
    names = np.array([part.name for part in parts], object)
    several = sum(not part.replay for part in parts) > 1
    schema = EXAMPLE_SCHEMA.append(SOURCE) if several else EXAMPLE_SCHEMA
    train: list[TrainExamples] = []
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(pa.ipc.new_stream(str(out / f"{split}.arrow"), schema)) for split in Split
        }
        progress = stack.enter_context(Progress("tokenizing", int(taken.sum()), UNIT))
        for chosen, batch in taken_rows([part.file for part in parts], taken):
            progress.add(len(chosen))
            examples = encoder.encode(batch)
            _count_refused(examples, chosen, statistics)
            statistics.omitted = dict(examples.omitted + Counter(statistics.omitted))
            if not len(examples.rows):
                continue
            indices = chosen[examples.rows]
            sides = np.array([drawn.side_of(i, data) for i in indices])
            columns = [*_columns(examples, indices), pa.array(drawn.categories[indices], pa.string())]
            columns += [pa.array(names[drawn.sources[indices]], pa.string())] if several else []
            labelled = _labelled_tokens(examples)
            statistics.without_label += int((labelled == 0).sum())
            name_first(statistics.first_without_label, indices[labelled == 0])
            for split, writer in writers.items():
                kept = np.flatnonzero((sides == split) & (labelled > 0))
                if len(kept):
                    writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema).take(pa.array(kept)))
                statistics.examples[split] += len(kept)
                if split is Split.TRAIN:
                    numbers = TrainExamples(indices, examples.lengths, labelled, examples.truncated)
                    train.append(numbers.take(kept))
    return TrainExamples.joined(train)


def _count_refused(examples: TokenizedRows, chosen: NDArray[np.int64], statistics: Statistics) -> None:
    if examples.refused and not statistics.refused:
        row, reason = examples.refused[0]
        statistics.first_refused = f"row {chosen[row]} of dolly_raw: {reason}"
    statistics.refused += len(examples.refused)


def _columns(examples: TokenizedRows, indices: NDArray[np.int64]) -> list[pa.Array]:
    offsets = pa.array(np.concatenate([[0], np.cumsum(examples.lengths)]), pa.int32())
    return [
        pa.ListArray.from_arrays(offsets, pa.array(examples.input_ids)),
        pa.ListArray.from_arrays(offsets, pa.array(examples.labels)),
        pa.array(examples.prompt_lengths),
        pa.array(indices),
    ]


def _labelled_tokens(examples: TokenizedRows) -> NDArray[np.int64]:
    """Number of labelled tokens of each example, without its first token, which nothing predicts. Shape (n,)."""
    starts = np.cumsum(examples.lengths) - examples.lengths
    learned = (examples.labels != IGNORED).astype(np.int64)
    learned[starts[examples.lengths > 0]] = 0
    return np.add.reduceat(learned, starts)


def _mix(
    train: TrainExamples, parts: Sequence[RawPart], drawn: Rows, data: Data, statistics: Statistics, out: Path
) -> TrainExamples:
    """Drop train examples beyond the sources' shares of the tokens, and beyond the share of replayed rows."""
    sources, ranks, replayed = drawn.sources[train.rows], drawn.ranks[train.rows], drawn.replayed[train.rows]
    kept = np.ones(len(train.rows), np.bool_)
    current = [index for index, part in enumerate(parts) if not part.replay]
    weights = [parts[index].weight for index in current]
    if all(weights):
        members = np.flatnonzero(~replayed)
        given = [float(weight or 0) for weight in weights]
        kept[members] = choose(train.lengths[members], sources[members], ranks[members], given)
    if replayed.any():
        members = np.flatnonzero(kept)
        kept[members] = choose_replayed(train.lengths[members], replayed[members], ranks[members], data.replay)
    if not kept.all():
        _keep(out / f"{Split.TRAIN}.arrow", kept)
    statistics.examples[Split.TRAIN] = int(kept.sum())
    if len(current) > 1 or any(part.weight or part.max_rows for part in parts):
        total = train.lengths[kept].sum()
        for index in current:
            own = sources == index
            tokens = int(train.lengths[own & kept].sum())
            statistics.sources[parts[index].name] = {
                "train_examples": int((own & kept).sum()),
                "train_tokens": tokens,
                "token_share": float(tokens / total) if total else 0.0,
                "left_out_rows": int((own & ~kept).sum()),
                "left_out_tokens": int(train.lengths[own & ~kept].sum()),
            }
            if (own & ~kept).sum() > FREQUENT * own.sum():
                logger.warning(
                    "Source %s: %s of %s training rows are left out so that each source has its weight of the tokens",
                    parts[index].name,
                    int((own & ~kept).sum()),
                    int(own.sum()),
                )
    return train.take(kept)


def _keep(stream: Path, kept: NDArray[np.bool_]) -> None:
    """Rewrite an Arrow stream with some of its rows."""
    whole = stream.with_suffix(".whole")
    stream.replace(whole)
    start = 0
    with (
        pa.ipc.open_stream(pa.memory_map(str(whole))) as reader,
        pa.ipc.new_stream(str(stream), reader.schema) as writer,
    ):
        for batch in reader:
            wanted = np.flatnonzero(kept[start : start + len(batch)])
            start += len(batch)
            if len(wanted):
                writer.write_batch(batch.take(pa.array(wanted)))
    whole.unlink()


def _describe_train(train: TrainExamples, drawn: Rows, statistics: Statistics) -> None:
    replayed = drawn.replayed[train.rows]
    statistics.truncated = int(train.truncated.sum())
    name_first(statistics.first_truncated, train.rows[train.truncated])
    statistics.labelled_tokens = int(train.labelled.sum())
    statistics.replayed_rows, statistics.replayed_tokens = int(replayed.sum()), int(train.lengths[replayed].sum())


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
