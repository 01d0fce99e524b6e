"""The gate's arithmetic: what it promotes by chance, what it finds, what it says."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune_assets.config.schema import Gate
from finetune_assets.evaluation.gate import Gain, judge, paired_gain


def draws(rows: int, gain: float, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Losses of answers of very different length, of which the second saves `gain` nats a token, give or take."""
    rng = np.random.default_rng(seed)
    tokens = rng.lognormal(3.5, 1.0, rows).astype(np.int64) + 1
    before = tokens * rng.gamma(4.0, 0.5, rows)
    return before, before - tokens * (gain + rng.standard_t(4, rows) * 0.1), tokens


def test_gain_is_the_saved_loss_a_token() -> None:
    before, after, tokens = np.array([10.0, 30.0, 8.0]), np.array([9.0, 24.0, 8.0]), np.array([5, 20, 10])
    gain = paired_gain(before, after, tokens, 0.95)
    assert gain.mean == pytest.approx((before.sum() - after.sum()) / 35)
    assert gain.lower < gain.mean
    assert gain.rows == 3


def test_bound_is_near_the_normal_one_where_rows_are_many() -> None:
    before, after, tokens = draws(4_000, 0.02, seed=1)
    gain = paired_gain(before, after, tokens, 0.95)
    saved = before - after - gain.mean * tokens
    error = np.sqrt((saved**2).sum()) / tokens.sum()
    assert gain.lower == pytest.approx(gain.mean - 1.645 * error, abs=0.15 * error)


def test_the_same_adapter_gains_nothing_and_is_refused() -> None:
    before, _, tokens = draws(100, 0.0, seed=1)
    gain = paired_gain(before, before, tokens, 0.95)
    assert (gain.mean, gain.lower) == (0.0, 0.0)
    assert not judge(gain, 0.0, Gate(), "the champion").promote


def test_same_rows_and_seed_decide_alike() -> None:
    before, after, tokens = draws(60, 0.02, seed=1)
    assert paired_gain(before, after, tokens, 0.95) == paired_gain(before, after, tokens, 0.95)


@pytest.mark.parametrize("rows", [40, pytest.param(200, marks=pytest.mark.soak)])
def test_noise_is_promoted_as_seldom_as_said(rows: int) -> None:
    promoted = 0
    for seed in range(400):
        before, after, tokens = draws(rows, 0.0, seed)
        promoted += paired_gain(before, after, tokens, 0.95).lower > 0
    assert promoted / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize(
    ("gain", "forgetting", "settings", "promoted", "decided"),
    [
        (Gain(0.1, 0.05, 0.95, 100), 0.1, Gate(), True, ("+0.1000", "100")),
        (Gain(0.1, -0.01, 0.95, 100), 0.1, Gate(), False, ("95%", "-0.0100")),
        (Gain(0.1, 0.05, 0.95, 100), 0.1, Gate(min_gain=0.06), False, ("0.06",)),
        (Gain(0.1, 0.05, 0.95, 100), 0.7, Gate(), False, ("0.7000", "0.5")),
        (Gain(0.1, 0.05, 0.95, 100), None, Gate(), True, ("+0.1000",)),
        (Gain(-0.1, -0.2, 0.95, 100), 0.7, Gate(), False, ("0.7000", "-0.1000")),
        (Gain(9.0, 8.0, 0.95, 29), 0.0, Gate(), False, ("29", "30")),
    ],
)
def test_verdict_names_the_number_that_decided(
    gain: Gain, forgetting: float | None, settings: Gate, promoted: bool, decided: tuple[str, ...]
) -> None:
    verdict = judge(gain, forgetting, settings, "the champion")
    assert verdict.promote is promoted
    numbers = {number.rstrip(".,") for number in re.findall(r"[+-]?\d[\d.,]*%?", verdict.reason)}
    assert numbers >= {*decided}, verdict.reason


def test_no_row_at_all_is_refused() -> None:
    nothing = np.zeros(0)
    gain = paired_gain(nothing, nothing, nothing.astype(np.int64), 0.95)
    assert not judge(gain, None, Gate(), "the base").promote
