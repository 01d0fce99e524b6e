"""The promotion gate: whether a challenger improves on the champion beyond noise and within the forgetting limit.

The gain is the mean reduction in loss, in nats per token, over held-out rows that influenced no choice. Its sampling
error is estimated by a bootstrap over these rows (Efron 1979), paired because both models are evaluated on the same
rows (Koehn 2004). The lower bound is studentized: each resampled gain is divided by its own standard error. With few
rows, the plain percentile bootstrap promotes more often than its nominal confidence level allows.

A challenger that learns from preferences must follow more of the held-out judgements than its opponent, beyond noise,
and its loss may rise by no more than a limit.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_assets.config.fingerprint import identity
from finetune_assets.config.schema import Gate

RESAMPLES = 10_000
AT_ONCE = 1_000
"""Resamples drawn at a time, which bounds memory when there are 100,000 rows."""


@dataclass(frozen=True)
class Gain:
    """Reduction in loss by a challenger.

    Attributes:
        mean: Mean gain, in nats per token.
        lower: One-sided lower bound of the gain, in nats per token.
        confidence: Confidence level of the lower bound.
        rows: Number of rows compared.
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
class PreferenceGain:
    """Gain in preferences by a challenger.

    Attributes:
        accuracy: Gain in preference accuracy, as a fraction of the judgements.
        margin: Gain in the reward margin, which does not depend on the reference.
    """

    accuracy: Gain
    margin: Gain

    @property
    def numbers(self) -> dict[str, Any]:
        """The gains as the gate's check shows them."""
        return {
            "judgements": self.accuracy.rows,
            "preference_gain": self.accuracy.mean,
            "preference_gain_lower": self.accuracy.lower,
            "reward_margin_gain": self.margin.mean,
            "reward_margin_gain_lower": self.margin.lower,
        }


@dataclass(frozen=True)
class Verdict:
    """Decision of the gate.

    Attributes:
        promote: Whether the challenger is promoted.
        reason: The measurements that decided, as text.
        numbers: All measurements and thresholds.
    """

    promote: bool
    reason: str
    numbers: dict[str, Any]


def paired_gain(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    tokens: NDArray[np.int64] | NDArray[np.float64],
    confidence: float,
    seed: int = 0,
) -> Gain:
    """Compute the mean gain of the challenger over its opponent, and the bootstrap lower bound of that gain.

    Args:
        before: Summed loss of each row's answer under champion or base, in nats; shape (rows,).
        after: Summed loss under the challenger, in nats; shape (rows,).
        tokens: Number of tokens of each row's answer; shape (rows,).
        confidence: Confidence level of the one-sided lower bound.
        seed: Seed of the resampling.
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
        means, errors = _ratio(_draw_counts(rng, min(AT_ONCE, RESAMPLES - at), rows) @ sums)
        pivots.append(np.divide(means - mean, errors, out=np.zeros_like(means), where=errors > 0))
    return Gain(float(mean), float(mean - np.quantile(np.concatenate(pivots), confidence) * error), confidence, rows)


def paired_preferences(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    base: NDArray[np.float64],
    weights: NDArray[np.float64],
    confidence: float,
) -> Gain:
    """Compute the gain in preference accuracy, as a fraction of the judgements, and its bootstrap lower bound.

    One judgement more is won and one more is lost in the lower bound (Bonett and Price 2012): where few judgements
    change, a bootstrap without them promotes noise up to twice as often as its confidence level allows.

    Args:
        before: Preference of each judgement under the opponent, in nats; shape (judgements,).
        after: The same under the challenger.
        base: The same under the base model.
        weights: Weight of each judgement.
        confidence: Confidence level of the one-sided lower bound.
    """
    saved = weights * (wins(after - base) - wins(before - base))
    padded, with_both = np.concatenate([saved, [1.0, -1.0]]), np.concatenate([weights, [1.0, 1.0]])
    lower = paired_gain(padded, np.zeros(len(padded)), with_both, confidence).lower if len(saved) else -np.inf
    mean = float(saved.sum() / weights.sum()) if len(saved) else 0.0
    return Gain(mean, lower, confidence, len(saved))


def wins(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for each margin above 0, 0 below, and 0.5 at 0."""
    return (np.sign(margins) + 1) / 2


def _draw_counts(rng: np.random.Generator, count: int, rows: int) -> NDArray[np.float64]:
    """Draw `count` resamples, as how often each contains each row; shape (count, rows)."""
    indices = rng.integers(0, rows, (count, rows)) + np.arange(count)[:, None] * rows
    return np.bincount(indices.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)


def _ratio(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute mean gain per token and its standard error (by linearization) for each resample.

    Args:
        sums: Sums of saved, weight, saved^2, saved * weight and weight^2; shape (resamples, 5).
    """
    saved, weight, saved2, both, weight2 = sums.T
    mean = saved / weight
    squares = saved2 - 2 * mean * both + mean**2 * weight2  # sum of (saved - mean * weight)^2
    return mean, np.sqrt(np.maximum(squares, 0)) / weight


def judge(
    gain: Gain,
    forgetting: float | None,
    settings: Gate,
    opponent: str,
    mode: str | None = None,
    increases: Mapping[str, float] | None = None,
    preferences: PreferenceGain | None = None,
) -> Verdict:
    """Decide whether the challenger is promoted over its opponent.

    Args:
        gain: Gain over the opponent.
        forgetting: Increase in loss over the base on general text, in nats per token; None if not measured.
        settings: Thresholds.
        opponent: Name of the opponent, for messages.
        mode: Mode of the gain, with retrieval.
        increases: Increase in loss over the opponent in each mode of `gate.max_loss_of`, in nats per token.
        preferences: Gain in preferences over the opponent, of a challenger that learns from judgements.
    """
    increases = increases or {}
    numbers: dict[str, Any] = {**asdict(gain), "forgetting": forgetting, "thresholds": identity(settings)}
    numbers |= {"mode": mode} if mode else {}
    numbers |= {f"loss_increase_{name}": increase for name, increase in increases.items()}
    numbers |= preferences.numbers if preferences else {}
    failures, max_forgetting = [], settings.max_forgetting
    decided, counted = (preferences.accuracy.rows, "judgements") if preferences else (gain.rows, "comparable gate rows")
    if decided < settings.min_rows:
        failures.append(
            f"only {decided} {counted} (gate.min_rows = {settings.min_rows}); add rows, raise "
            "data.gate_fraction, or promote manually with finetune adapter promote"
        )
    if forgetting is not None and forgetting > max_forgetting:
        failures.append(
            f"forgetting is {forgetting:.4f} nats/token on general text (gate.max_forgetting = {max_forgetting:g})"
        )
    for name, increase in increases.items():
        most = settings.max_loss_of[name]
        if not increase <= most:  # no row was compared if it is not a number
            failures.append(
                f"loss in the mode {name} is {increase:+.4f} nats/token above {opponent}'s (gate.max_loss_of.{name} = "
                f"{most:g})"
            )
    if preferences:
        return _judge_preferences(gain, preferences, settings, opponent, failures, numbers)
    where = f" in the mode {mode}" if mode else ""
    improvement = f"improvement over {opponent}{where}: {gain}; gate.min_gain = {settings.min_gain:g}"
    if gain.rows and gain.lower <= settings.min_gain:
        failures.append(improvement)
    return Verdict(not failures, "; ".join(failures) or improvement, numbers)


def _judge_preferences(
    gain: Gain,
    preferences: PreferenceGain,
    settings: Gate,
    opponent: str,
    failures: list[str],
    numbers: dict[str, Any],
) -> Verdict:
    """Decide by preferences, with the loss as a bound."""
    most, least, loss = settings.max_loss_increase, settings.min_preference_gain, -gain.mean
    if loss > most:
        failures.append(
            f"held-out loss is {loss:+.4f} nats/token above {opponent}'s (gate.max_loss_increase = {most:g})"
        )
    accuracy = preferences.accuracy
    improvement = (
        f"preference accuracy over {opponent}: {accuracy.mean:+.1%} on {accuracy.rows:,} held-out judgements "
        f"({accuracy.confidence:.0%} lower bound {accuracy.lower:+.1%}); gate.min_preference_gain = {least:g}"
    )
    if accuracy.rows and accuracy.lower <= least:
        failures.append(improvement)
    bounded = f"{improvement}; held-out loss {loss:+.4f} nats/token (gate.max_loss_increase = {most:g})"
    return Verdict(not failures, "; ".join(failures) or bounded, numbers)
