"""Measures for the data checks: duplicates, near-duplicates, leaked answers, and drift between versions."""

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_assets.data.folding import folded, sequence_hashes, words_of
from finetune_assets.data.near_duplicates import THRESHOLD, GrowingSignatures, Signatures, earlier_near_duplicates, sign
from finetune_assets.data.rows import Row, RowKind, kind_of, rejected_texts, texts_of

SHOWN = 5
"""Maximum number of rows to name for each problem."""
LEAST_LEAK = 20
"""Minimum length of a leaked response, in folded characters; shorter ones (`yes`, a name, a number) may legitimately
occur in their question."""


def hashed(*parts: str) -> int:
    """Hash to 64 bits; ten million different texts contain a collision with a probability of 1 in 400,000."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


@dataclass
class Quality:
    """Quality problems of good rows, counted in one pass that keeps 156 bytes per row (16 without near-duplicates).

    Attributes:
        duplicates: Number of exact duplicates of an earlier row.
        near_duplicates: Number of near-duplicates of an earlier row that are not exact duplicates.
        leaked: Number of rows with an instruction that contains the response. A response in the context is not
            counted: many tasks are to extract it from there.
        lengths: Number of rows by characters of prompt and response, in powers of two: bin n holds lengths below 2^n.
        first_duplicates: Numbers of the first duplicates (from 0), each with the number of the earlier row.
        first_near_duplicates: The same for near-duplicates.
        first_leaked: Numbers of the first rows with a leaked response.
        near_duplicate_threshold: Minimum similarity of near-duplicates; None if only rows that are equal up to case,
            spaces and punctuation are near-duplicates.
    """

    duplicates: int = 0
    near_duplicates: int = 0
    leaked: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    first_duplicates: list[tuple[int, int]] = field(default_factory=list)
    first_near_duplicates: list[tuple[int, int]] = field(default_factory=list)
    first_leaked: list[int] = field(default_factory=list)
    near_duplicate_threshold: float | None = None


class InspectedRows(NamedTuple):
    """What the checks need of a batch of rows.

    Attributes:
        exact: Hash of each row; shape (n,).
        folded: Hash of each row after folding, if near-duplicates are compared for equality only; else empty.
        signatures: Signature of each row; None if near-duplicates are compared for equality only.
        lengths: Number of rows by the number of bits of their length.
        leaked: Indices of the rows with a leaked response.
    """

    exact: "array[int]"
    folded: NDArray[np.uint64]
    signatures: Signatures | None
    lengths: Counter[int]
    leaked: list[int]


def inspect_rows(rows: Sequence[Row], threshold: float | None = THRESHOLD) -> InspectedRows:
    """Inspect a batch of rows, independently of all others.

    Args:
        rows: The rows.
        threshold: Minimum similarity of near-duplicates; None compares the rows for equality only.
    """
    texts = [texts_of(row) for row in rows]
    exact = array("Q")
    for row, parts in zip(rows, texts, strict=True):
        columns = row["instruction"], row["context"], row["response"]
        judgement = [*rejected_texts(row)] if kind_of(row) is not RowKind.LABELLED else [str(row["label"])]
        exact.append(hashed(*columns, *(parts if row["messages"] else ()), *judgement))
    words = words_of([part for parts in texts for part in parts])
    offsets = np.cumsum([0, *(len(parts) for parts in texts)])
    if threshold is None:
        folded_hashes, signatures = sequence_hashes(words.folded, offsets), None
    else:
        folded_hashes, signatures = np.empty(0, np.uint64), sign(words, offsets)
    counts = words.counts.tolist()
    leaked = [
        number
        for number, (row, parts, start) in enumerate(zip(rows, texts, offsets[:-1].tolist(), strict=True))
        if leaks(row, dict(zip(parts, counts[start : start + len(parts)], strict=True)))
    ]
    lengths = Counter(sum(map(len, parts)).bit_length() for parts in texts)
    return InspectedRows(exact, folded_hashes, signatures, lengths, leaked)


class Inspector:
    """Accumulates the `Quality` of inspected rows, in their order.

    Args:
        threshold: As of `inspect_rows`.
    """

    def __init__(self, threshold: float | None = THRESHOLD) -> None:
        self._exact, self._folded, self._signatures = array("Q"), array("Q"), GrowingSignatures()
        self._lengths: Counter[int] = Counter()
        self._quality = Quality(near_duplicate_threshold=threshold)

    def add(self, rows: InspectedRows) -> None:
        first = len(self._exact)
        self._exact += rows.exact
        self._folded.frombytes(rows.folded.tobytes())
        if rows.signatures is not None:
            self._signatures.append(rows.signatures)
        self._lengths += rows.lengths
        self._quality.leaked += len(rows.leaked)
        named = self._quality.first_leaked
        named += [first + row for row in rows.leaked[: SHOWN - len(named)]]

    def sum_up(self) -> Quality:
        quality = self._quality
        exact = _repeats(self._exact)
        if quality.near_duplicate_threshold is None:
            near = _repeats(self._folded)
        else:
            earlier = earlier_near_duplicates(self._signatures.all(), quality.near_duplicate_threshold)
            rows = np.flatnonzero(earlier >= 0)
            near = np.stack([rows, earlier[rows]], axis=1)
        near = near[~np.isin(near[:, 0], exact[:, 0])]
        quality.duplicates, quality.near_duplicates = len(exact), len(near)
        quality.first_duplicates = [(int(row), int(first)) for row, first in exact[:SHOWN]]
        quality.first_near_duplicates = [(int(row), int(first)) for row, first in near[:SHOWN]]
        quality.lengths = {str(bits): count for bits, count in sorted(self._lengths.items())}
        return quality


def leaks(row: Row, words: Mapping[str, int]) -> bool:
    """Whether the instruction of a row contains its response.

    Args:
        row: The row.
        words: Number of words of each text of the row; rows with a longer response than instruction need no search.
    """
    instruction, response = row["instruction"], row["response"]
    if words.get(response, 0) > words.get(instruction, 0):
        return False
    answer = folded(response)
    return len(answer) >= LEAST_LEAK and answer in folded(instruction)


def _repeats(hashes: "array[int]") -> NDArray[np.int64]:
    """Rows with a hash that occurs earlier, and the row of its first occurrence; shape (n, 2), in row order."""
    values = np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    firsts = first[group]
    rows = np.flatnonzero(firsts != np.arange(len(values)))
    return np.stack([rows, firsts[rows]], axis=1)


def distance(ours: Mapping[str, int], others: Mapping[str, int]) -> float:
    """Total variation distance of two distributions given as counts: 0 if equal, 1 if disjoint."""
    totals = sum(ours.values()), sum(others.values())
    if not all(totals):
        return 0.0 if totals[0] == totals[1] else 1.0
    names = ours.keys() | others.keys()
    return math.fsum(abs(ours.get(name, 0) / totals[0] - others.get(name, 0) / totals[1]) for name in names) / 2
