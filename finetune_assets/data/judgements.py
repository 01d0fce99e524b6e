"""Judgements of a prepared dataset as a whole: contradictions, and how much longer the preferred answers are."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from finetune_assets.data.dataset_statistics import SHOWN, Statistics
from finetune_assets.data.rows import Split
from finetune_assets.data.selection import taken_batches
from finetune_assets.data.sensitive import masked

ADAPTERS, LONGEST_NAME = 100, 200
"""Maximum number of served adapters that are named, and characters of their names."""


class _Answers(NamedTuple):
    """Judged answers of a batch of examples, in order.

    Attributes:
        rows: Number of each answer's row in the raw data; shape (n,).
        hashes: Hash of the tokens of prompt and answer.
        lengths: Number of tokens of the answer.
        good: Whether it is a chosen or good answer.
        in_pair: Whether it is one of a pair; the chosen answer comes first.
    """

    rows: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    good: NDArray[np.bool_]
    in_pair: NDArray[np.bool_]

    @staticmethod
    def joined(parts: list["_Answers"]) -> "_Answers":
        none = np.empty(0, np.bool_)
        parts = [
            _Answers(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int64), none, none),
            *parts,
        ]
        return _Answers(*map(np.concatenate, zip(*parts, strict=True)))


def describe_judgements(folder: Path, statistics: Statistics) -> None:
    """Count the judgements of a dataset, by split, and those that contradict another one; compare the lengths.

    Args:
        folder: Folder of the dataset, with the examples of each split.
        statistics: Completed with the numbers.
    """
    parts = []
    for split in Split:
        answers = _Answers.joined([*_judged_answers(folder / f"{split}.arrow")])
        pairs = int(answers.in_pair.sum()) // 2
        statistics.pairs[split], statistics.labelled[split] = pairs, len(answers.rows) - 2 * pairs
        parts.append(answers)
    answers = _Answers.joined(parts)
    for good, name in ((True, "chosen"), (False, "rejected")):
        lengths = answers.lengths[answers.good == good]
        statistics.judged_tokens[name] = round(float(lengths.mean()), 2) if len(lengths) else 0.0
    conflicts = _conflicts(answers)
    statistics.conflicting = len(conflicts)
    statistics.first_conflicting = [(int(row), int(other)) for row, other in conflicts[:SHOWN]]


def length_bias(statistics: dict[str, float]) -> float:
    """How much longer the preferred answers are on average, as a fraction of the others' length; 0 without both.

    Args:
        statistics: `Statistics.judged_tokens`.
    """
    chosen, rejected = statistics.get("chosen", 0.0), statistics.get("rejected", 0.0)
    return chosen / rejected - 1 if chosen and rejected else 0.0


def judged_adapters(files: Sequence[Path], taken: NDArray[np.bool_]) -> dict[str, int]:
    """Number of judgements by the served adapter that they name, most frequent first; at most `ADAPTERS` of them.

    Args:
        files: Parquet files of the raw data.
        taken: Whether each row is used; shape (rows,).
    """
    counts: Counter[str] = Counter()
    for _, batch in taken_batches(files, taken, ["adapter"]):
        counts.update(batch.column("adapter").drop_null().to_pylist())
    return {masked(name)[:LONGEST_NAME]: rows for name, rows in counts.most_common(ADAPTERS)}


def _judged_answers(path: Path) -> Iterator[_Answers]:
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        for batch in reader:
            judged = batch.filter(pc.or_(batch["pair"].is_valid(), batch["desirable"].is_valid()))
            if not len(judged):
                continue
            in_pair = judged["pair"].is_valid().to_numpy(zero_copy_only=False)
            good = pc.if_else(judged["pair"].is_valid(), judged["chosen"], judged["desirable"])
            ids, lengths = judged["input_ids"], pc.list_value_length(judged["input_ids"]).to_numpy()
            tokens = np.ascontiguousarray(ids.flatten().to_numpy(), np.int32)
            ends = np.cumsum(lengths)
            hashes = [_hash(tokens[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
            answered = lengths - judged["prompt_length"].to_numpy()
            yield _Answers(
                judged["row"].to_numpy(),
                np.array(hashes, np.uint64),
                answered.astype(np.int64),
                good.to_numpy(zero_copy_only=False).astype(np.bool_),
                in_pair,
            )


def _hash(tokens: NDArray[np.int32]) -> int:
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "big")


def _conflicts(answers: _Answers) -> NDArray[np.int64]:
    """Rows whose judgement contradicts another one of the same answers, and the first such row; shape (n, 2).

    Pairs contradict each other if they prefer opposite answers, single answers if they have both labels. A pair that
    rejects an answer which another pair prefers to a third one is no contradiction.
    """
    chosen = np.flatnonzero(answers.in_pair & answers.good)
    ours, theirs = answers.hashes[chosen], answers.hashes[chosen + 1]
    single = np.flatnonzero(~answers.in_pair)
    subjects = np.concatenate(
        [np.minimum(ours, theirs) * np.uint64(3) + np.maximum(ours, theirs), answers.hashes[single]]
    )
    sides = np.concatenate([ours < theirs, answers.good[single]])
    rows = np.concatenate([answers.rows[chosen], answers.rows[single]])
    _, group = np.unique(subjects, return_inverse=True)
    first = np.full((2, int(group.max(initial=-1)) + 1), np.iinfo(np.int64).max)
    for side in (0, 1):
        np.minimum.at(first[side], group[sides == side], rows[sides == side])
    others = first[np.where(sides, 0, 1), group]
    found = others < np.iinfo(np.int64).max
    conflicts = np.stack([rows[found], others[found]], axis=1)
    return conflicts[np.argsort(conflicts[:, 0], kind="stable")]
