"""Judged answers of held-out rows: which of two answers a model prefers, and by how much.

The reward of an answer is `beta` times its log-probability minus the base model's, as in DPO (arXiv:2305.18290). A
judgement is either a pair of a chosen and a rejected answer, or one answer labelled good or bad. Its *preference* is
the log-probability of the chosen answer minus that of the rejected one; of a single answer, its own log-probability,
negative if the answer is bad. Its *margin* is `beta` times the preference minus the base model's: above 0, the model
has moved from the base towards the judgement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune_assets.config.preference_schema import Preference
from finetune_assets.evaluation.gate import wins
from finetune_assets.evaluation.metrics import ANSWER_WORDS, PREFERENCE_ACCURACY, REWARD_MARGIN

BINS = 21
"""Number of bins of the histograms of margins."""
SPREAD = 0.98
"""Fraction of the margins inside the histograms' limits; the others are counted in the outermost bins."""
Values = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Judgements:
    """Judgements of the held-out rows.

    Attributes:
        accepted: Indices of the examples that are right: of instruction rows, chosen and good answers.
        answers: Indices of the examples that are judged; shape (answers,).
        owners: Number of the judgement of each judged answer; shape (answers,).
        signs: 1 for a chosen or good answer, -1 for a rejected or bad one; shape (answers,).
        is_pair: Whether each judgement is a pair; shape (judgements,).
        rows: Number of each judgement's row in the raw data; shape (judgements,).
    """

    accepted: NDArray[np.int64]
    answers: NDArray[np.int64]
    owners: NDArray[np.int64]
    signs: NDArray[np.int64]
    is_pair: Mask
    rows: NDArray[np.int64]

    @staticmethod
    def of(examples: pa.Table) -> "Judgements | None":
        """Read the judgements of a split; None for a dataset without any."""
        if "chosen" not in examples.column_names:
            return None
        chosen, desirable = (_tri_state(examples[name]) for name in ("chosen", "desirable"))
        is_pair = ~np.isnan(chosen)
        good = np.where(is_pair, chosen, desirable)
        rows = examples["row"].to_numpy()
        answers = np.flatnonzero(~np.isnan(good))
        starts = np.ones(len(answers), np.bool_)
        starts[1:] = ~(is_pair[answers[1:]] & is_pair[answers[:-1]] & (np.diff(rows[answers]) == 0))
        return Judgements(
            np.flatnonzero(good != 0),  # also instruction rows, which are NaN
            answers,
            np.cumsum(starts) - 1,
            np.where(good[answers] > 0, 1, -1),
            is_pair[answers][starts],
            rows[answers][starts],
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def weights(self) -> Values:
        """Weight of each judgement; good and bad single answers weigh the same in total. Shape (judgements,)."""
        weights, single = np.ones(len(self)), ~self.is_pair
        good = self._first(self.signs) > 0
        sides = [group for group in (single & good, single & ~good) if group.any()]
        for group in sides:
            weights[group] = single.sum() / (len(sides) * group.sum())
        return weights

    def preferences(self, log_probabilities: Values) -> Values:
        """Preference of each judgement, in nats.

        Args:
            log_probabilities: Of each example of the split; shape (examples,).
        """
        signed = self.signs * log_probabilities[self.answers]
        return np.bincount(self.owners, signed, len(self)).astype(np.float64)

    def all_of(self, examples: Mask) -> Mask:
        """Whether a mask of examples holds for all answers of each judgement; shape (judgements,)."""
        return np.bincount(self.owners, ~examples[self.answers], len(self)) == 0

    def _first(self, values: NDArray[Any]) -> NDArray[Any]:
        """Value of each judgement's first answer."""
        return values[np.unique(self.owners, return_index=True)[1]]


@dataclass(frozen=True)
class Preferences:
    """Preferences of all contenders.

    Attributes:
        judgements: The judgements.
        comparable: Whether each judgement is comparable among the contenders; shape (judgements,).
        of: Preference of each judgement by contender, in nats; each of shape (judgements,).
        settings: Settings of the rewards.
    """

    judgements: Judgements
    comparable: Mask
    of: Mapping[str, Values]
    settings: Preference

    def margins(self, name: str) -> Values:
        """Margins of one contender on the comparable judgements; empty if the base was not measured."""
        base = self.of.get("base")
        if base is None:
            return np.zeros(0)
        return self.settings.beta * (self.of[name] - base)[self.comparable]

    def metrics(self, name: str) -> dict[str, float]:
        """Accuracy and mean margin of one contender; empty without comparable judgements."""
        margins, weights = self.margins(name), self.judgements.weights[self.comparable]
        if not len(margins):
            return {}
        accuracy, margin = (float(np.average(values, weights=weights)) for values in (wins(margins), margins))
        return {PREFERENCE_ACCURACY.name: accuracy, REWARD_MARGIN.name: margin}

    def described(self) -> dict[str, Any]:
        """What `evaluation.json` has of the judgements."""
        pairs = self.judgements.is_pair[self.comparable]
        return {
            "pairs": int(pairs.sum()),
            "labelled": int((~pairs).sum()),
            "beta": self.settings.beta,
            "length_normalised": self.settings.length_normalised,
            "margins": self._histograms(),
        }

    def table(self) -> dict[str, Any]:
        """Columns of `preferences.parquet`."""
        return {
            "row": self.judgements.rows,
            "pair": self.judgements.is_pair,
            "weight": self.judgements.weights,
            "comparable": self.comparable,
            **self.of,
        }

    def _histograms(self) -> dict[str, Any]:
        """Number of judgements by margin: limits of the bins, and counts by contender except the base, which has 0."""
        margins = {name: self.margins(name) for name in self.of if name != "base"}
        pooled = np.concatenate([np.zeros(0), *margins.values()])
        if not len(pooled):
            return {}
        low, high = np.quantile(pooled, [(1 - SPREAD) / 2, (1 + SPREAD) / 2])
        limit = max(abs(low), abs(high)) or 1.0
        edges = np.linspace(-limit, limit, BINS + 1)
        counts = {
            name: np.histogram(np.clip(values, -limit, limit), edges)[0].tolist() for name, values in margins.items()
        }
        return {"edges": edges.tolist(), "counts": counts}


def answer_words(texts: Sequence[str | None], rows: Sequence[int]) -> dict[str, float]:
    """Mean number of words of the generated answers to some rows; empty without rows."""
    words = [len((texts[row] or "").split()) for row in rows]
    return {ANSWER_WORDS.name: sum(words) / len(words)} if words else {}


def _tri_state(column: pa.ChunkedArray) -> Values:
    """1 for true, 0 for false, NaN for null."""
    return np.array([np.nan if value is None else float(value) for value in column.to_pylist()])
