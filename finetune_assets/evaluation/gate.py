"""Whether a challenger takes the champion's place: is it better beyond noise, and has it not forgotten too much.

The gain is the mean loss that the challenger saves, in nats a token, over rows that nothing has been chosen by. What
another draw of as many rows would have shown is what a bootstrap over them estimates (Efron 1979), paired, as both
answer the same rows (Koehn 2004). The lower bound is that of the resampled gains, each in its own standard errors; the
plain percentile promotes more often than it says where rows are few.
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
            f"{self.mean:+.4f} nats/token on {self.rows:,} held-out rows ({self.confidence:.0%} lower bound "
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
    rows = len(saved)
    if rows < 2:
        return Gain(float(saved.sum() / max(1.0, weights.sum())), -np.inf, confidence, rows)
    sums = np.stack([saved, weights, saved**2, saved * weights, weights**2], axis=1)
    (mean,), (error,) = _ratio(sums.sum(0, keepdims=True))
    if error == 0:
        return Gain(float(mean), float(mean), confidence, rows)
    rng = np.random.default_rng(seed)
    pivots = []
    for at in range(0, RESAMPLES, AT_ONCE):
        means, errors = _ratio(_drawn(rng, min(AT_ONCE, RESAMPLES - at), rows) @ sums)
        pivots.append(np.divide(means - mean, errors, out=np.zeros_like(means), where=errors > 0))
    return Gain(float(mean), float(mean - np.quantile(np.concatenate(pivots), confidence) * error), confidence, rows)


def _drawn(rng: np.random.Generator, count: int, rows: int) -> NDArray[np.float64]:
    """How often each of `count` resamples draws each row; shape (count, rows)."""
    places = rng.integers(0, rows, (count, rows)) + np.arange(count)[:, None] * rows
    return np.bincount(places.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)


def _ratio(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean gain a token, and its standard error by linearisation, of each resample.

    Args:
        sums: Of saved, weight, saved^2, saved * weight and weight^2; shape (resamples, 5).
    """
    saved, weight, saved2, both, weight2 = sums.T
    mean = saved / weight
    squares = saved2 - 2 * mean * both + mean**2 * weight2  # of saved - mean * weight
    return mean, np.sqrt(np.maximum(squares, 0)) / weight


def judge(gain: Gain, forgetting: float | None, settings: Gate, opponent: str) -> Verdict:
    """Whether the challenger is promoted over its opponent.

    Args:
        gain: Over the opponent.
        forgetting: By how many nats a token it is worse than the base on the general text; None if not measured.
        settings: The thresholds.
        opponent: What it was compared with, in words.
    """
    numbers: dict[str, Any] = {**asdict(gain), "forgetting": forgetting, "thresholds": asdict(settings)}
    against, most = [], settings.max_forgetting
    if gain.rows < settings.min_rows:
        against.append(
            f"only {gain.rows} comparable gate rows (gate.min_rows = {settings.min_rows}); add rows, raise "
            "data.gate_fraction, or promote manually with finetune adapter promote"
        )
    if forgetting is not None and forgetting > most:
        against.append(f"forgetting is {forgetting:.4f} nats/token on general text (gate.max_forgetting = {most:g})")
    gains = f"improvement over {opponent}: {gain}; gate.min_gain = {settings.min_gain:g}"
    if gain.rows and gain.lower <= settings.min_gain:
        against.append(gains)
    return Verdict(not against, "; ".join(against) or gains, numbers)
