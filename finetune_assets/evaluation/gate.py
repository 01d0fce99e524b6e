"""Whether a challenger takes the champion's place: is it better beyond noise, and has it not forgotten too much.

The gain is the mean loss that the challenger saves, in nats a token, over rows that nothing has been chosen by. Rows are
the unit of chance: what another draw of as many rows would have shown is what a bootstrap over them estimates (Efron
1979), paired, as both answer the same rows (Koehn 2004). Of the resampled gains, studentized by their own spread, the
lower bound is taken; the plain percentile promotes more often than it says where rows are few.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_assets.config.schema import Gate

RESAMPLES = 10_000
AT_ONCE = 1_000
"""Resamples drawn at a time, so that a hundred thousand rows need no gigabytes."""


@dataclass(frozen=True)
class Gain:
    """What a challenger saves.

    Attributes:
        mean: In nats a token.
        lower: Bound that it is above, with the confidence asked for.
        confidence: That confidence.
        rows: Rows compared.
    """

    mean: float
    lower: float
    confidence: float
    rows: int

    def __str__(self) -> str:
        return (
            f"{self.mean:+.4f} nats a token over {self.rows:,} rows (at {self.confidence:.0%} confidence more than "
            f"{self.lower:+.4f})"
        )


@dataclass(frozen=True)
class Verdict:
    """Whether a challenger is promoted.

    Attributes:
        promote: Whether.
        reason: The number that decided, in words.
        numbers: All that were looked at.
    """

    promote: bool
    reason: str
    numbers: dict[str, Any]


def paired_gain(
    before: NDArray[np.float64], after: NDArray[np.float64], tokens: NDArray[np.int64], confidence: float, seed: int = 0
) -> Gain:
    """How much less the challenger loses than what it is compared with, and what chance leaves of that.

    Args:
        before: Summed loss of each row's answer in nats, by champion or base; shape (rows,).
        after: The same by the challenger.
        tokens: Tokens of each row's answer; same shape.
        confidence: Of the lower bound, one-sided.
        seed: Of the resampling.
    """
    saved, weights = before - after, tokens.astype(np.float64)
    rows, mean = len(saved), float(saved.sum() / weights.sum())
    if rows < 2:
        return Gain(mean, -np.inf, confidence, rows)
    error = _standard_error(saved, weights, np.ones((1, rows)))[0]
    if error == 0:
        return Gain(mean, mean, confidence, rows)
    rng = np.random.default_rng(seed)
    pivots = np.concatenate(
        [_pivots(saved, weights, mean, rng, min(AT_ONCE, RESAMPLES - at)) for at in range(0, RESAMPLES, AT_ONCE)]
    )
    return Gain(mean, float(mean - np.quantile(pivots, confidence) * error), confidence, rows)


def _pivots(
    saved: NDArray[np.float64], weights: NDArray[np.float64], mean: float, rng: np.random.Generator, count: int
) -> NDArray[np.float64]:
    """Of each resample, how far its mean is off, in its own standard errors; shape (count,)."""
    rows = len(saved)
    drawn = rng.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(np.float64)
    means = drawn @ saved / (drawn @ weights)
    errors = _standard_error(saved, weights, drawn)
    return np.divide(means - mean, errors, out=np.zeros(count), where=errors > 0)


def _standard_error(
    saved: NDArray[np.float64], weights: NDArray[np.float64], drawn: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of the ratio of two sums, by its linearisation; of each resample, given how often it drew each row."""
    total = drawn @ weights
    mean = drawn @ saved / total
    # sum of drawn * (saved - mean * weights)^2, without an array of resamples x rows
    squares = drawn @ saved**2 - 2 * mean * (drawn @ (saved * weights)) + mean**2 * (drawn @ weights**2)
    return np.sqrt(np.maximum(squares, 0)) / total


def judge(gain: Gain, forgetting: float | None, settings: Gate, opponent: str) -> Verdict:
    """Whether the challenger takes its opponent's place.

    Args:
        gain: Over the opponent.
        forgetting: By how many nats a token it is worse than the base on the general text; None if not measured.
        settings: What is asked for.
        opponent: What it was compared with, in words.
    """
    numbers: dict[str, Any] = {**asdict(gain), "forgetting": forgetting, "asked": asdict(settings)}
    if gain.rows < settings.min_rows:
        return Verdict(False, f"only {gain.rows} rows in the gate, at least {settings.min_rows} are needed", numbers)
    if forgetting is not None and forgetting > settings.max_forgetting:
        told = f"it forgot {forgetting:.4f} nats a token of the general text, at most {settings.max_forgetting:g} may be"
        return Verdict(False, told, numbers)
    better = gain.lower > settings.min_gain
    told = f"its gain over {opponent} is {gain}, and more than {settings.min_gain:g} is needed"
    return Verdict(better, told, numbers)
