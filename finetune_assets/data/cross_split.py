"""Near-duplicates on both sides of the split: training rows that repeat a held-out row.

A row is compared in three ways. Any of them makes a training row a near-duplicate of a held-out row:

* By its prompt, exactly (up to case, spaces and punctuation): instruction and context; of a conversation with one
  exchange, its user and system turn.
* By its exchange, exactly: the last user turn and the last answer, whatever the system turn. The last exchange of a
  longer conversation counts if it has at least `LEAST_EXCHANGE` words, because many conversations end with the same
  thanks. A longer conversation also repeats each conversation that it continues.
* By similarity: instruction and context; of a conversation, all turns except the system turn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune_assets.data.folding import Words, mixed, sequence_hashes, words_of
from finetune_assets.data.near_duplicates import THRESHOLD, GrowingSignatures, Index, Signatures, sign
from finetune_assets.data.processes import Processes
from finetune_assets.data.rows import Row

LEAST_EXCHANGE = 12
"""Minimum length, in words, of the last exchange of a longer conversation that is compared without earlier turns."""
_PROMPT = np.uint64(0x2545F4914F6CDD1D)
"""Keeps hashes of prompts and of exchanges apart."""


class Keys(NamedTuple):
    """Hashes of which equal ones make rows near-duplicates.

    Attributes:
        rows: Number of each hash's row; shape (hashes,).
        hashes: The hashes; shape (hashes,).
    """

    rows: NDArray[np.int64]
    hashes: NDArray[np.uint64]


class ComparedRows(NamedTuple):
    """What rows are compared by.

    Attributes:
        signatures: Signature of each row's compared text.
        whole: Prompts and exchanges. Equal ones make two rows near-duplicates.
        beginnings: Conversations that a row continues. One that equals another row's whole makes them near-duplicates.
    """

    signatures: Signatures
    whole: Keys
    beginnings: Keys


@dataclass
class NearDuplicates:
    """Near-duplicates across the split.

    Attributes:
        train: Numbers of the training rows with a held-out near-duplicate, in order.
        held_out: For each of them, the number of the first such held-out row.
        all_held_out: Numbers of all held-out rows with a near-duplicate in the training split, in order.
    """

    train: list[int] = field(default_factory=list)
    held_out: list[int] = field(default_factory=list)
    all_held_out: list[int] = field(default_factory=list)


Batch = tuple[NDArray[np.int64], Sequence[Row] | pa.RecordBatch]
"""Rows with their numbers in the raw data."""
ComparedBatch = tuple[NDArray[np.int64], ComparedRows]
"""The same, as they are compared."""


def near_duplicates_across(
    held_out: Iterable[Batch], train: Iterable[Batch], threshold: float = THRESHOLD, processes: Processes | None = None
) -> NearDuplicates:
    """Find the training rows that repeat a held-out row; the order of the rows has no effect on which these are.

    Args:
        held_out: All held-out rows, in batches.
        train: All training rows, in batches.
        threshold: Minimum similarity of near-duplicates.
        processes: Processes that compute signatures and hashes; by default this one.
    """
    processes = processes or Processes(1)
    given = _HeldOut(processes.map(_compared_batch, held_out), threshold)
    found = NearDuplicates()
    if not len(given.numbers):
        return found
    all_held_out: list[NDArray[np.int64]] = []
    for numbers, batch in processes.map(_compared_batch, train):
        mine, others = given.find(batch)
        first = np.flatnonzero(np.diff(mine, prepend=-1))
        found.train += numbers[mine[first]].tolist()
        found.held_out += others[first].tolist()
        all_held_out.append(np.unique(others))
    found.all_held_out = np.unique(np.concatenate([np.empty(0, np.int64), *all_held_out])).tolist()
    return found


class _HeldOut:
    """The held-out rows, indexed."""

    def __init__(self, batches: Iterable[ComparedBatch], threshold: float) -> None:
        signatures, numbers = GrowingSignatures(), [np.empty(0, np.int64)]
        whole, beginnings = list[Keys](), list[Keys]()
        for theirs, batch in batches:
            numbers.append(theirs)
            signatures.append(batch.signatures)
            whole.append(Keys(theirs[batch.whole.rows], batch.whole.hashes))
            beginnings.append(Keys(theirs[batch.beginnings.rows], batch.beginnings.hashes))
        self.numbers = np.concatenate(numbers)
        self._index = Index(signatures.all(), threshold)
        self._members = _Groups(Keys(self.numbers, self._index.group.astype(np.uint64)))
        self._whole = _Groups(_joined(whole))
        self._all = _Groups(_joined([*whole, *beginnings]))

    def find(self, rows: ComparedRows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs of a row of the batch and the number of a held-out row, in order, each once."""
        mine, groups = self._index.find(rows.signatures)
        pairs = [
            self._members.find(Keys(mine, groups.astype(np.uint64))),
            self._all.find(rows.whole),
            self._whole.find(rows.beginnings),
        ]
        found = np.unique(np.concatenate(pairs), axis=0)
        return found[:, 0], found[:, 1]


class _Groups:
    """Held-out rows by hash."""

    def __init__(self, keys: Keys) -> None:
        order = np.lexsort([keys.rows, keys.hashes])
        self._hashes, self._rows = keys.hashes[order], keys.rows[order]

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Pairs of a row of `keys` and a held-out row with the same hash; shape (pairs, 2).

        Of a hash with many rows on both sides, each row is in a pair, but not every pair is listed.
        """
        low, high = (np.searchsorted(self._hashes, keys.hashes, side) for side in ("left", "right"))
        hit = np.flatnonzero(low < high)
        _, once = np.unique(keys.hashes[hit], return_index=True)
        counts = np.ones(len(hit), np.int64)
        counts[once] = (high - low)[hit[once]]
        at = np.repeat(low[hit] - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        return np.stack([np.repeat(keys.rows[hit], counts), self._rows[at]], axis=1)


def _compared_batch(batch: Batch) -> ComparedBatch:
    numbers, rows = batch
    return numbers, compared(rows.to_pylist() if isinstance(rows, pa.RecordBatch) else rows)


def compared(rows: Sequence[Row]) -> ComparedRows:
    """What rows are compared by; keys name a row by its index in `rows`."""
    texts = [_text(row) for row in rows]
    lengths = np.array([len(text) for text in texts], np.int64)
    single = np.array([not row["messages"] for row in rows], np.bool_)
    words = words_of([part for text in texts for part in text])
    last = np.cumsum(lengths) - 1  # response, or system turn: no part of a prompt's or a conversation's similarity
    similar = np.ones(len(words.offsets) - 1, np.bool_)
    similar[last] = False
    signatures = sign(words.of(similar), np.concatenate([[0], np.cumsum(lengths - 1)]))
    whole, beginnings = _keys(rows, words, last - lengths + 1, lengths, single)
    return ComparedRows(signatures, whole, beginnings)


def _text(row: Row) -> list[str]:
    """Instruction, context, response; or the turns of a conversation without its system turn, and then that."""
    if not row["messages"]:
        return [row["instruction"], row["context"], row["response"]]
    turns = [turn for turn in row["messages"] if turn["role"] != "system"]
    return [*map(_said, turns), row["context"]]


def _said(turn: Mapping[str, Any]) -> str:
    """Text of a turn, with anything else that it holds except its role and numbers (a weight is no text)."""
    return " ".join(
        str(value) for key, value in turn.items() if key != "role" and value and not isinstance(value, int | float)
    )


def _keys(
    rows: Sequence[Row],
    words: Words,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    single: NDArray[np.bool_],
) -> tuple[Keys, Keys]:
    folded = words.folded
    plain = np.flatnonzero(single)
    first = starts[plain]
    edges = np.concatenate([[0], np.stack([first, first + 2], axis=1).ravel(), [len(words.offsets) - 1]])
    asked = sequence_hashes(words.hashes, words.offsets[edges])[1::2]
    whole = [
        Keys(plain, _sums(asked, folded[first + 2])),
        Keys(plain, _sums(folded[first] ^ _PROMPT, folded[first + 1])),
    ]
    beginnings = []
    for row in np.flatnonzero(~single).tolist():
        roles = [turn["role"] for turn in rows[row]["messages"] if turn["role"] != "system"]
        turns = slice(int(starts[row]), int(starts[row] + lengths[row]))
        own, before = _keys_of_conversation(roles, folded[turns], words.counts[turns])
        whole.append(Keys(np.full(len(own), row), own))
        beginnings.append(Keys(np.full(len(before), row), before))
    return _joined(whole), _joined(beginnings)


def _keys_of_conversation(
    roles: list[str], folded: NDArray[np.uint64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hashes of a conversation's whole, prompt and exchange, and of the conversations that it continues."""
    turns = folded[: len(roles)]
    up_to = np.cumsum(mixed(turns + np.arange(len(turns)).astype(np.uint64)), dtype=np.uint64)
    answers = [i for i, role in enumerate(roles) if role == "assistant"]
    questions = [i for i, role in enumerate(roles[: answers[-1]]) if role == "user"]
    own = [up_to[answers[-1:]]]
    if (questions, answers) == ([0], [1]):
        own.append(_sums(turns[:1] ^ _PROMPT, folded[-1:]))
    elif questions:
        pair = [questions[-1], answers[-1]]
        if counts[pair].sum() >= LEAST_EXCHANGE:
            own.append(_sums(turns[pair[:1]], turns[pair[1:]]))
    return np.concatenate(own), up_to[answers[:-1]]


def _sums(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash of pairs of texts, as of a conversation of two turns; shape (pairs,)."""
    return mixed(first) + mixed(second + np.uint64(1))


def _joined(keys: list[Keys]) -> Keys:
    keys = [Keys(np.empty(0, np.int64), np.empty(0, np.uint64)), *keys]
    return Keys(np.concatenate([part.rows for part in keys]), np.concatenate([part.hashes for part in keys]))
