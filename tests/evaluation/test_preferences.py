"""Judged answers of held-out rows: what counts as preferred, and what the gate makes of it."""

import re

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from finetune_assets.config.preference_schema import Preference
from finetune_assets.config.schema import Gate
from finetune_assets.evaluation.gate import Gain, PreferenceGain, judge, paired_preferences
from finetune_assets.evaluation.preferences import Judgements, Preferences

EXAMPLES = pa.table(
    {
        "row": [3, 5, 5, 6, 6, 8, 9, 10],
        "pair": pa.array([None, 5, 5, 6, 6, None, None, None], pa.int64()),
        "chosen": pa.array([None, True, False, True, False, None, None, None], pa.bool_()),
        "desirable": pa.array([None, None, None, None, None, True, False, False], pa.bool_()),
    }
)
"""An instruction, two pairs, a good answer and two bad ones."""
GOOD = Gain(0.1, 0.05, 0.95, 100)


def judgements() -> Judgements:
    found = Judgements.of(EXAMPLES)
    assert found
    return found


def test_right_answers_are_those_of_instructions_and_the_accepted_ones() -> None:
    assert judgements().accepted.tolist() == [0, 1, 3, 5]
    assert Judgements.of(EXAMPLES.drop_columns(["pair", "chosen", "desirable"])) is None


def test_a_preference_is_the_chosen_answers_log_probability_minus_the_rejected_ones() -> None:
    log_probabilities = np.array([-1.0, -2.0, -5.0, -7.0, -4.0, -3.0, -2.0, -6.0])
    assert judgements().preferences(log_probabilities).tolist() == [3.0, -3.0, -3.0, 2.0, 6.0]
    assert judgements().rows.tolist() == [5, 6, 8, 9, 10]
    assert judgements().is_pair.tolist() == [True, True, False, False, False]


def test_good_and_bad_answers_weigh_the_same_in_total() -> None:
    """So that a model which raises or lowers the log-probability of all answers gains nothing."""
    assert judgements().weights == pytest.approx([1, 1, 1.5, 0.75, 0.75])
    everything_rises = judgements().preferences(np.full(len(EXAMPLES), 2.0))
    found = Preferences(judgements(), np.ones(5, bool), {"base": np.zeros(5), "challenger": everything_rises}, BETA)
    assert found.metrics("challenger") == pytest.approx({"preference_accuracy": 0.5, "reward_margin": 0.0})


BETA = Preference(beta=0.5)


def test_accuracy_and_margin_are_relative_to_the_base() -> None:
    base = np.array([-4.0, 1.0, 0.0, 0.0, 0.0])
    challenger = np.array([-2.0, 1.0, -1.0, 3.0, 3.0])
    compared = np.array([True, True, True, True, False])
    found = Preferences(judgements(), compared, {"base": base, "challenger": challenger}, BETA)
    assert found.metrics("base") == {"preference_accuracy": 0.5, "reward_margin": 0.0}
    metrics = found.metrics("challenger")
    weights = np.array([1, 1, 1.5, 0.75])
    assert metrics["preference_accuracy"] == pytest.approx((weights * [1, 0.5, 0, 1]).sum() / weights.sum())
    assert metrics["reward_margin"] == pytest.approx(0.5 * (weights * [2, 0, -1, 3]).sum() / weights.sum())
    described = found.described()
    assert (described["pairs"], described["labelled"]) == (2, 2)
    assert sum(described["margins"]["counts"]["challenger"]) == 4


def test_a_judgement_is_compared_if_both_of_its_answers_are() -> None:
    usable = np.array([True, True, False, True, True, True, True, False])
    assert judgements().all_of(usable).tolist() == [False, True, True, True, False]
    nothing = Preferences(judgements(), np.zeros(5, bool), {"base": np.zeros(5), "challenger": np.ones(5)}, BETA)
    assert nothing.metrics("challenger") == {}
    assert nothing.described()["margins"] == {}


def draws(rows: int, changed: float, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Preferences relative to the base before and after: a fraction of the judgements changes its side at random."""
    rng = np.random.default_rng(seed)
    before = rng.normal(0, 1, rows)
    if changed == 1:  # before is the base itself
        return np.zeros(rows), before
    sides = np.where(rng.random(rows) < changed, rng.choice([-1.0, 1.0], rows), np.sign(before))
    return before, np.abs(before) * sides


@pytest.mark.system
@pytest.mark.parametrize("changed", [0.1, 1.0])
def test_noise_is_promoted_as_seldom_as_said(changed: float) -> None:
    promoted, base, weights = 0, np.zeros(30), np.ones(30)
    for seed in range(200):
        promoted += paired_preferences(*draws(30, changed, seed), base, weights, 0.95).lower > 0
    assert promoted / 200 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


def test_a_real_gain_is_found() -> None:
    base, before = np.zeros(50), np.array([1.0] * 30 + [-1.0] * 20)
    after = np.array([1.0] * 45 + [-1.0] * 5)
    gain = paired_preferences(before, after, base, np.ones(50), 0.95)
    assert gain.mean == pytest.approx(15 / 50)
    assert 0.15 < gain.lower < 0.3
    assert paired_preferences(base[:0], base[:0], base[:0], base[:0], 0.95).rows == 0


@pytest.mark.parametrize(
    ("loss", "accuracy", "settings", "promoted", "decided"),
    [
        (GOOD, Gain(0.3, 0.2, 0.95, 50), Gate(), True, ("+30.0%", "50")),
        (Gain(-0.05, -0.2, 0.95, 100), Gain(0.3, 0.2, 0.95, 50), Gate(), True, ("+30.0%",)),
        (Gain(-0.2, -0.3, 0.95, 100), Gain(0.3, 0.2, 0.95, 50), Gate(), False, ("+0.2000", "0.1")),
        (GOOD, Gain(0.02, -0.01, 0.95, 50), Gate(), False, ("+2.0%", "-1.0%")),
        (GOOD, Gain(0.3, 0.2, 0.95, 50), Gate(min_preference_gain=0.25), False, ("0.25",)),
        (GOOD, Gain(0.9, 0.8, 0.95, 29), Gate(), False, ("29", "30")),
        (GOOD, Gain(0.0, -np.inf, 0.95, 0), Gate(), False, ("0", "30")),
    ],
)
def test_both_preferences_and_loss_decide(
    loss: Gain, accuracy: Gain, settings: Gate, promoted: bool, decided: tuple[str, ...]
) -> None:
    verdict = judge(loss, 0.1, settings, "the champion", preferences=PreferenceGain(accuracy, accuracy))
    assert verdict.promote is promoted
    assert {number.rstrip(".,") for number in re.findall(r"[+-]?\d[\d.,]*%?", verdict.reason)} >= {*decided}
    assert verdict.numbers["preference_gain"] == accuracy.mean
    assert verdict.numbers["mean"] == loss.mean
    forgetful = judge(loss, 0.7, settings, "the champion", preferences=PreferenceGain(accuracy, accuracy))
    assert not forgetful.promote
