"""Converts raw Parquet rows to training-ready Arrow files, in one pass over the text and bounded memory.

`data.processes` compute batches of rows; this process reads the rows and writes the examples in their order, so the
number of processes changes no byte.

The output folder contains `train.arrow`, `val.arrow` and `gate.arrow` (Arrow streams that `datasets.Dataset.from_file`
can open too) and, with packing, `packs.arrow`: the train examples of each packed sequence.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune_assets.config.schema import Data
from finetune_assets.data.dataset_statistics import FILL_BINS, LENGTH_BINS, Statistics, name_first
from finetune_assets.data.encoding import Contexts, TrainExamples, encoded_batches, example_schema
from finetune_assets.data.errors import DataError
from finetune_assets.data.judgements import describe_judgements, judged_adapters
from finetune_assets.data.learning import SFT, Learning
from finetune_assets.data.mixture import choose, choose_replayed
from finetune_assets.data.packing import pack, sequences_of
from finetune_assets.data.processes import PROCESSES, Processes, process_count
from finetune_assets.data.raw_files import RawPart, number_of_rows
from finetune_assets.data.rows import Split
from finetune_assets.data.selection import Rows, describe_split, draw_rows, leave_out, select
from finetune_assets.data.tokenization import Encoder
from finetune_assets.progress import ROWS as UNIT
from finetune_assets.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
ROWS_PER_PROCESS = 5_000
"""Rows for each process with `auto`: about three times what is prepared in the time that a process takes to start
(benchmarks/RESULTS.md)."""
FREQUENT = 0.2
"""A prompt with more than this fraction of the rows explains an empty split. It is logged if more rows of a source than
this are left out."""
PACK_SCHEMA = pa.schema([pa.field("examples", pa.list_(pa.int32()), metadata={"doc": "indices into train.arrow"})])


def prepare_dataset(
    rows: Path | Sequence[RawPart],
    tokenizer: "PreTrainedTokenizerBase",
    data: Data,
    split_salt: str,
    out: Path,
    contexts: Contexts | None = None,
    learning: Learning = SFT,
) -> Statistics:
    """Select, split, render, tokenize, label, mix and pack rows.

    Args:
        rows: A Parquet file of `RAW_SCHEMA`, or the versions of several sources.
        tokenizer: Tokenizer of the base model.
        data: Data settings of the experiment.
        split_salt: Salt of the content hashes.
        out: Folder to write to.
        contexts: Replaces the contexts of the rows before they are rendered. Rows are selected, split and compared as
            they are in the raw data.
        learning: What the training learns from.

    Raises:
        LostProcess: if one of `data.processes` is killed.
        DataError: if a category does not occur, or no train or no validation example is left.
    """
    parts = [RawPart("", rows)] if isinstance(rows, Path) else [*rows]
    files = [part.file for part in parts]
    statistics = Statistics()
    count = process_count(data.processes, number_of_rows(files), ROWS_PER_PROCESS)
    with Processes(count, PROCESSES) as processes:
        drawn = draw_rows(parts, split_salt, processes)
        taken = select(drawn, parts, data, statistics, learning)
        describe_split(files, drawn, taken, data, statistics)
        leave_out(files, drawn, taken, data, statistics, processes)
        encoder = Encoder(tokenizer, data)
        train = _write_examples(parts, encoder, drawn, taken, data, statistics, out, processes, contexts, learning)
    train = _mix(train, parts, drawn, data, statistics, out)
    _describe_train(train, drawn, statistics)
    if learning.judged:
        describe_judgements(out, statistics)
        statistics.adapters = judged_adapters(files, taken)
    _check_not_empty(statistics, data, learning)
    _describe_lengths(train.lengths, statistics)
    _write_packs(train, data, statistics, out, learning)
    return statistics


def _write_examples(
    parts: Sequence[RawPart],
    encoder: Encoder,
    drawn: Rows,
    taken: NDArray[np.bool_],
    data: Data,
    statistics: Statistics,
    out: Path,
    processes: Processes,
    contexts: Contexts | None,
    learning: Learning,
) -> TrainExamples:
    """Write one Arrow stream per split."""
    several = sum(not part.replay for part in parts) > 1
    files, names = [part.file for part in parts], [part.name for part in parts] if several else None
    schema = example_schema(several, contexts is not None, learning.judged)
    train: list[TrainExamples] = []
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(pa.ipc.new_stream(str(out / f"{split}.arrow"), schema)) for split in Split
        }
        progress = stack.enter_context(Progress("tokenizing", int(taken.sum()), UNIT))
        for batch in encoded_batches(files, names, encoder, drawn, taken, data, processes, contexts, learning):
            progress.add(batch.rows)
            statistics.first_refused = statistics.first_refused or batch.first_refused
            statistics.refused += batch.refused
            statistics.omitted = dict(batch.omitted + Counter(statistics.omitted))
            statistics.without_label += len(batch.without_label)
            name_first(statistics.first_without_label, batch.without_label)
            for split, examples in batch.examples.items():
                writers[split].write_batch(examples)
                statistics.examples[split] += len(examples)
            train.append(batch.train)
    return TrainExamples.joined(train)


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
    kept &= ~np.isin(train.rows, train.rows[~kept])  # the answers of a pair stay together
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


def _check_not_empty(statistics: Statistics, data: Data, learning: Learning) -> None:
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
    judged = statistics.pairs.get(Split.TRAIN, 0) + statistics.labelled.get(Split.TRAIN, 0)
    if learning.judged and left[Split.TRAIN] and not judged:
        wanted = "pairs ('chosen' and 'rejected')" if learning.pairs else "pairs or labelled answers ('label')"
        raise DataError(
            f"training.objective {learning.objective} requires {wanted}, and no training row is one: {counts}"
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


def _write_packs(train: TrainExamples, data: Data, statistics: Statistics, out: Path, learning: Learning) -> None:
    lengths = train.lengths
    units = sequences_of(train.rows, learning.pairs)
    statistics.sequences = len(units)
    if not data.tokenization.packing:
        return
    capacity = learning.sequence_tokens(data.tokenization, packed=True)
    packed = pack(np.add.reduceat(lengths, [unit[0] for unit in units]), capacity)
    packs = [[example for unit in members for example in units[unit]] for members in packed]
    statistics.sequences = len(packs)
    statistics.fill = round(statistics.tokens / (capacity * len(packs)), 4)
    starts = np.cumsum([0, *map(len, packs[:-1])])
    filled = np.add.reduceat(lengths[np.fromiter(chain.from_iterable(packs), np.int64, len(lengths))], starts)
    bins = np.minimum(filled * FILL_BINS // capacity, FILL_BINS - 1)
    statistics.fill_histogram = np.bincount(bins, minlength=FILL_BINS).tolist()
    with pa.ipc.new_stream(str(out / "packs.arrow"), PACK_SCHEMA) as writer:
        writer.write_table(pa.table({"examples": pa.array(packs, pa.list_(pa.int32()))}, schema=PACK_SCHEMA))
