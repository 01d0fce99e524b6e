"""What the checks look at: rows that repeat others, answers that stand in their question, and how one version differs
from another."""

import hashlib
import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_assets.data.rows import Row

SHOWN = 5
"""Rows that are shown of each kind."""
LEAST_LEAK = 20
"""Characters of a folded response below which it may well stand in its question: `yes`, a name, a number."""
BETWEEN_WORDS = re.compile(r"[\W_]+")


def folded(text: str) -> str:
    """Text without what does not tell two apart: Unicode form, case, spaces and punctuation."""
    return BETWEEN_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def hashed(*parts: str) -> int:
    """64 bits; of ten million different texts two meet once in four hundred thousand times."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


@dataclass
class Quality:
    """What is wrong with good rows, counted while they pass by; 16 bytes a row are kept until all have.

    Attributes:
        duplicates: Rows that repeat an earlier one.
        near_duplicates: Rows that do so but for case, spaces and punctuation.
        leaked: Rows whose response stands in their instruction. In their context it may: that is what many are asked
            to find.
        lengths: Rows by the characters of prompt and response, in powers of two: bin n holds lengths below 2^n.
        first_duplicates: Numbers of the first rows (from 0) that repeat another, each with the earlier one's.
        first_near_duplicates: The same of near duplicates.
        first_leaked: Numbers of the first rows whose response leaks.
    """

    duplicates: int = 0
    near_duplicates: int = 0
    leaked: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    first_duplicates: list[tuple[int, int]] = field(default_factory=list)
    first_near_duplicates: list[tuple[int, int]] = field(default_factory=list)
    first_leaked: list[int] = field(default_factory=list)


class Inspector:
    """Looks at each row once, and sums up."""

    def __init__(self) -> None:
        self._exact, self._folded = array("Q"), array("Q")
        self._lengths: Counter[int] = Counter()
        self._found = Quality()

    def look(self, row: Row) -> None:
        instruction, context, response = row["instruction"], row["context"], row["response"]
        turns = [part for turn in row["messages"] or () for part in (turn["role"], turn["content"])]
        parts = [instruction, context, response, *turns]
        plain = [folded(part) for part in parts]
        number = len(self._exact)
        self._exact.append(hashed(*parts))
        self._folded.append(hashed(*plain))
        self._lengths[sum(map(len, turns or parts)).bit_length()] += 1
        if len(plain[2]) >= LEAST_LEAK and plain[2] in plain[0]:
            self._found.leaked += 1
            if len(self._found.first_leaked) < SHOWN:
                self._found.first_leaked.append(number)

    def sum_up(self) -> Quality:
        found = self._found
        exact, near = _repeats(self._exact), _repeats(self._folded)
        near = near[~np.isin(near[:, 0], exact[:, 0])]
        found.duplicates, found.near_duplicates = len(exact), len(near)
        found.first_duplicates = [(int(row), int(first)) for row, first in exact[:SHOWN]]
        found.first_near_duplicates = [(int(row), int(first)) for row, first in near[:SHOWN]]
        found.lengths = {str(bits): count for bits, count in sorted(self._lengths.items())}
        return found


def _repeats(hashes: "array[int]") -> NDArray[np.int64]:
    """Rows whose hash has come before, and where it came first; shape (n, 2), in the order of the rows."""
    values = np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    firsts = first[group]
    rows = np.flatnonzero(firsts != np.arange(len(values)))
    return np.stack([rows, firsts[rows]], axis=1)


def distance(ours: Mapping[str, int], others: Mapping[str, int]) -> float:
    """Total variation distance of two distributions, given as counts: 0 for the same, 1 if nothing is shared."""
    totals = sum(ours.values()), sum(others.values())
    if not all(totals):
        return 0.0 if totals[0] == totals[1] else 1.0
    names = ours.keys() | others.keys()
    return math.fsum(abs(ours.get(name, 0) / totals[0] - others.get(name, 0) / totals[1]) for name in names) / 2


def rows_by_number(batches: Any, numbers: set[int]) -> dict[int, Row]:
    """Rows of a Parquet file by their numbers.

    Args:
        batches: Record batches, in order.
        numbers: Whose rows are wanted; the reading ends with the last of them.
    """
    found: dict[int, Row] = {}
    start = 0
    for batch in batches:
        here = sorted(number - start for number in numbers if start <= number < start + len(batch))
        found |= {start + index: batch.slice(index, 1).to_pylist()[0] for index in here}
        start += len(batch)
        if len(found) == len(numbers):
            break
    return found
