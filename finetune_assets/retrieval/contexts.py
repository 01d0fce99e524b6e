"""Puts passages into the contexts of raw rows: which passages, in what order, and what the answer is then.

The method is RAFT's (arXiv:2403.10131): the golden passage among distractors, and in a share of the training rows
distractors only. Every choice is a function of the row's content, the documents, the settings and a salt: it does not
depend on other rows, on the row's number, or on the number of processes.
"""

import hashlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from struct import unpack
from typing import TYPE_CHECKING, Any, Protocol

from finetune_assets.config.schema import Data, Retrieval
from finetune_assets.data.errors import RefusedRow
from finetune_assets.data.raw_files import raw_batches
from finetune_assets.data.rows import Row, Split, draw, plain, side_of
from finetune_assets.data.tokenization import Encoder
from finetune_assets.retrieval.citations import with_citations
from finetune_assets.retrieval.golden import golden_passages
from finetune_assets.retrieval.index import Index, open_index, read_description
from finetune_assets.retrieval.statistics import passage_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BM25 = "bm25"
"""The kind of index that is searched in several processes, and without torch."""
PASSAGE, BETWEEN = "[{number}] {text}", "\n\n"
"""Format of a passage in a context, and the text between two of them."""

READ_ROWS = 10_000
SPARE = 10
"""Passages to search for instead of those of held-out rows, as a multiple of the passages of a row."""


class Mode(StrEnum):
    """What a row's context is replaced with."""

    CLOSED_BOOK = "closed_book"
    """Nothing: the question alone."""
    GOLDEN = "golden"
    """The golden passages."""
    GOLDEN_AND_DISTRACTORS = "golden_and_distractors"
    """As in training, always with the golden passages."""
    RETRIEVED = "retrieved"
    """The passages that the index finds, best first, as served."""
    TRAINING = "training"
    """`GOLDEN_AND_DISTRACTORS`, or distractors only: `golden_share` decides."""


class Lengths(Protocol):
    """Measures rows as the model reads them."""

    def lengths(self, rows: Sequence[Row]) -> Sequence[int]:
        """Number of tokens of each row, with its answer."""


def numbered(passages: Sequence[str]) -> str:
    """Passages as the context of a row: numbered from 1, with blank lines between them."""
    return BETWEEN.join(PASSAGE.format(number=number, text=text) for number, text in enumerate(passages, 1))


@dataclass
class Chosen:
    """The passages of one row.

    Attributes:
        row: The raw row.
        key: Hash of the row.
        golden: Numbers of the row's golden passages, whether they are shown or not.
        shown: Numbers of the passages to show, best first.
        dropped: Number of passages that did not fit.
    """

    row: Row
    key: bytes
    golden: list[int]
    shown: list[int]
    dropped: int = 0

    @property
    def distractors(self) -> list[int]:
        return [passage for passage in self.shown if passage not in self.golden]


class RowContexts:
    """Replaces the contexts of raw rows by passages of a document set. It can be pickled.

    Args:
        folder: Folder of the index.
        settings: The experiment's settings of retrieval.
        salt: Salt of the choices.
        encoder: Measures rows.
        longest: Maximum length of a row, in tokens. Passages are dropped until the row fits: the lowest-ranked
            distractors first, and golden ones last. An answer is never cut for a passage.
        held_out: Numbers of the golden passages of held-out rows, which are distractors of no training row.
    """

    def __init__(
        self,
        folder: Path,
        settings: Retrieval,
        salt: str,
        encoder: Lengths,
        longest: int,
        held_out: Set[int] = frozenset(),
    ) -> None:
        self.folder, self.settings, self.salt = folder, settings, salt
        self.encoder, self.longest, self.held_out = encoder, longest, held_out

    @cached_property
    def index(self) -> Index:
        return open_index(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the open index. An index with a model is searched in one process."""
        if self.index.kind != BM25:
            raise TypeError(f"an index of the kind {self.index.kind} is searched in one process")
        return {name: value for name, value in vars(self).items() if name != "index"}

    def __call__(self, rows: Sequence[Row], splits: Sequence[Split]) -> list[Row | RefusedRow]:
        """Replace the contexts of rows: of training rows as the settings require, of held-out rows as `RETRIEVED`."""
        replaced: list[Row | RefusedRow] = [*rows]
        of_training = Mode.CLOSED_BOOK if self.settings.closed_book else Mode.TRAINING
        for mode in (of_training, Mode.RETRIEVED):
            numbers = [i for i, split in enumerate(splits) if (split == Split.TRAIN) == (mode is of_training)]
            for i, row in zip(numbers, self.apply([rows[i] for i in numbers], mode), strict=True):
                replaced[i] = row
        return replaced

    def apply(self, rows: Sequence[Row], mode: Mode) -> list[Row | RefusedRow]:
        """Replace the contexts of rows, and the answers where the passages decide them.

        Returns:
            The rows with other values of `context` and `response`, and with these keys: `passages` (ids of the passages
            in their order), `golden` (ids of the row's golden passages, whether they are shown or not) and
            `dropped_passages` (number of passages that did not fit). A conversation, which has no context to replace,
            is refused.
        """
        chosen = [*self._choices([row for row in rows if not row["messages"]], mode)]
        self._shorten(chosen, mode)
        replaced = iter(chosen)
        return [_refused(row) if row["messages"] else self._replaced(next(replaced), mode) for row in rows]

    # ---- choice

    def _choices(self, rows: Sequence[Row], mode: Mode) -> Iterator[Chosen]:
        golden = [golden_passages(self.index.passages, row["context"]) for row in rows]
        hits = self.index.search([row["instruction"] for row in rows], self._searched(golden, mode))
        for row, own, found in zip(rows, golden, hits, strict=True):
            chosen = Chosen(row, self._key(row), own, [])
            chosen.shown = self._shown(chosen, [hit.passage for hit in found], mode)
            yield chosen

    def _searched(self, golden: Sequence[list[int]], mode: Mode) -> int:
        """Number of passages to search for, enough to leave some out."""
        most = self.settings.passages
        if mode is Mode.RETRIEVED:
            return most
        return (
            most + max(map(len, golden), default=0) + (SPARE * most if mode is Mode.TRAINING and self.held_out else 0)
        )

    def _avoided(self, chosen: Chosen, mode: Mode) -> Set[int]:
        """Passages that are no distractors of a row."""
        return {*self.held_out, *chosen.golden} if mode is Mode.TRAINING else {*chosen.golden}

    def _shown(self, chosen: Chosen, hits: list[int], mode: Mode) -> list[int]:
        """Numbers of a row's passages, best first."""
        most = self.settings.passages
        if mode is Mode.CLOSED_BOOK:
            return []
        if mode is Mode.RETRIEVED:
            return hits[:most]
        if mode is Mode.TRAINING and self.settings.fewest_passages:
            most -= _hashed(chosen.key, "passages") % (most - self.settings.fewest_passages + 1)
        ranks = {passage: rank for rank, passage in enumerate(hits)}
        golden = sorted(chosen.golden, key=lambda passage: (ranks.get(passage, len(hits)), passage))[:most]
        if mode is Mode.GOLDEN:
            return golden
        if mode is Mode.TRAINING and _hashed(chosen.key, "golden") / 2**64 >= self.settings.golden_share:
            golden = []
        avoided = self._avoided(chosen, mode)
        if self.settings.distractors == "random":
            distractors = self._random(chosen.key, avoided, most - len(golden))
        else:
            distractors = [hit for hit in hits if hit not in avoided][: most - len(golden)]
        return sorted([*golden, *distractors], key=lambda passage: ranks.get(passage, len(hits)))  # stable

    def _random(self, key: bytes, avoided: Set[int], count: int) -> list[int]:
        """Distractors drawn by the row's content."""
        total, draw = len(self.index.passages), 0
        drawn = dict[int, None]()
        while len(drawn) < min(count, total - len(avoided)):
            passage = _hashed(key, f"distractor {draw}") % total
            draw += 1
            if passage not in avoided:
                drawn[passage] = None
        return [*drawn]

    def _key(self, row: Row) -> bytes:
        text = "\0".join(plain(row[name]) for name in ("instruction", "context", "response"))
        return hashlib.blake2b(text.encode(), key=self.salt.encode()[:64], person=b"passages", digest_size=16).digest()

    # ---- length

    def _shorten(self, chosen: Sequence[Chosen], mode: Mode) -> None:
        """Drop passages of the rows that are too long, one at a time."""
        long = [row for row in chosen if row.shown]
        while long:
            lengths = self.encoder.lengths([self._replaced(row, mode) for row in long])
            long = [row for row, length in zip(long, lengths, strict=True) if length > self.longest]
            for row in long:
                # What a server drops does not depend on the golden passage
                droppable = row.shown if mode is Mode.RETRIEVED else row.distractors or row.shown
                row.shown.remove(droppable[-1])
                row.dropped += 1
            long = [row for row in long if row.shown]

    # ---- text

    def _replaced(self, chosen: Chosen, mode: Mode) -> Row:
        passages, order = self.index.passages, self._ordered(chosen, mode)
        return {
            **chosen.row,
            "context": numbered([passages.texts[passage] for passage in order]),
            "response": self._response(chosen, order, mode),
            "passages": [passages.ids[passage] for passage in order],
            "golden": [passages.ids[passage] for passage in chosen.golden],
            "dropped_passages": chosen.dropped,
        }

    def _ordered(self, chosen: Chosen, mode: Mode) -> list[int]:
        if self.settings.order == "ranked" or mode in (Mode.RETRIEVED, Mode.GOLDEN):
            return chosen.shown
        ids = self.index.passages.ids
        return sorted(chosen.shown, key=lambda passage: _hashed(chosen.key, f"order {ids[passage]}"))

    def _response(self, chosen: Chosen, order: Sequence[int], mode: Mode) -> str:
        """The answer, with its citation; the refusal if no golden passage is shown. A closed book is answered."""
        response = str(chosen.row["response"])
        golden = [number for number, passage in enumerate(order, 1) if passage in chosen.golden]
        if golden:
            return with_citations(response, golden) if self.settings.cite else response
        refuses = self.settings.without_golden == "refuse" and mode is not Mode.CLOSED_BOOK
        return self.settings.refusal if refuses else response


@dataclass(frozen=True)
class Passages:
    """Where the passages of an experiment's rows come from, with what decides which.

    Attributes:
        folder: Folder of the index.
        data: Data settings of the experiment, with `data.retrieval`.
        salt: Salt of the split and of the choices.
    """

    folder: Path
    data: Data
    salt: str

    @property
    def needs_torch(self) -> bool:
        """Whether the index may use torch: that of words does not."""
        return bool(read_description(self.folder)["index"]["kind"] != BM25)

    def contexts(self, tokenizer: "PreTrainedTokenizerBase", raw: Sequence[Path] = ()) -> RowContexts:
        """What puts the passages into rows.

        Args:
            tokenizer: Tokenizer of the experiment.
            raw: Parquet files of the raw data that the experiment uses; needed for training rows alone.
        """
        settings, longest = self.data.retrieval, self.data.tokenization.cutoff_len
        assert settings
        held_out = held_out_passages(raw, self.folder, self.data, self.salt)
        encoder = Encoder(tokenizer, self.data)
        return RowContexts(self.folder, settings, self.salt, encoder, longest, held_out)

    def statistics(self, dataset: Path) -> dict[str, dict[str, int]]:
        """`passage_statistics` of a tokenized dataset."""
        return passage_statistics(dataset)


def held_out_passages(raw: Sequence[Path], folder: Path, data: Data, salt: str) -> set[int]:
    """Numbers of the golden passages of all held-out rows.

    Args:
        raw: Parquet files of the raw data.
        folder: Folder of the index.
        data: Data settings of the experiment.
        salt: Salt of the split.
    """
    passages, numbers = open_index(folder).passages, set[int]()
    for _, batch in raw_batches(raw, READ_ROWS, ["instruction", "context"]):
        for row in batch.to_pylist():
            if side_of(draw(row["instruction"], row["context"], salt), data) is not Split.TRAIN:
                numbers.update(golden_passages(passages, row["context"]))
    return numbers


def _refused(row: Row) -> RefusedRow:
    return RefusedRow(
        f"a conversation of {len(row['messages'])} turns has no context that passages could replace (data.retrieval); "
        "select other rows with data.categories or data.sources"
    )


def _hashed(key: bytes, purpose: str) -> int:
    """A pseudo-random 64-bit number, the same with every version of Python."""
    (number,) = unpack(">Q", hashlib.blake2b(purpose.encode(), key=key, digest_size=8).digest())
    return int(number)
