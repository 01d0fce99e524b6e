"""What is read of the points of a sweep: the frontier, the smallest adapter within noise, and seeds as one point."""

from typing import Any

import numpy as np
import pytest

from finetune_assets.evaluation.sweeps import SEED, Found, behind_best, frontier, over_seeds, smallest

ROWS = 400
RANK, BATCH = "lora.rank", "training.macro_batch_size"


def point(loss: float, parameters: int = 100, spread: float = 0.0, noise: int = 0, **changed: Any) -> Found:
    """A point whose rows have so many nats per token on average, and on each row up to `spread` more or less."""
    values: dict[str, Any] = {"settings": {}, "forgetting": None, "seconds": 1.0, "memory": 10, **changed}
    deviations = np.random.default_rng(noise).uniform(-spread, spread, ROWS)
    losses = 5.0 * (loss + deviations - deviations.mean())
    name = f"sweep.{loss}"
    return Found(name, rows=np.arange(ROWS), losses=losses, tokens=np.full(ROWS, 5), parameters=parameters, **values)


def test_the_frontier_is_what_no_cheaper_point_beats() -> None:
    points = [point(2.0, 400), point(2.5, 100), point(2.6, 200), point(2.2, 300), point(2.4, 100)]
    assert [(one.parameters, round(one.loss, 6)) for one in frontier(points, "parameters")] == [
        (100, 2.4),
        (300, 2.2),
        (400, 2.0),
    ]


def test_the_smallest_within_noise_is_chosen() -> None:
    """The middle one is worse by a hundredth that rows of its kind vary by; the small one by far more."""
    best, middle, small = point(2.0, 400), point(2.01, 200, 0.5, 1), point(2.3, 100, 0.5, 2)
    behind = behind_best([best, middle, small], 0.95)
    assert behind[small.name].lower > 0.2
    assert behind[middle.name].lower < 0 < behind[middle.name].mean
    assert smallest([best, middle, small], behind) is middle


def test_seeds_are_one_point_with_the_mean_of_each_row() -> None:
    points = [
        point(loss, spread=0.3, noise=seed, settings={BATCH: batch, SEED: seed}, seconds=seed, memory=seed)
        for batch, losses in {8: (2.0, 2.2, 2.1), 64: (2.5, 2.4)}.items()
        for seed, loss in enumerate(losses, 1)
    ]
    small, large = over_seeds(points)
    assert (small.settings, large.settings) == ({BATCH: 8}, {BATCH: 64})
    assert small.of_seeds == pytest.approx((2.0, 2.1, 2.2))
    assert large.of_seeds == pytest.approx((2.4, 2.5))
    assert small.losses == pytest.approx(sum(one.losses for one in points[:3]) / 3)
    assert (small.loss, small.seconds, small.memory) == pytest.approx((2.1, 2.0, 3))
    assert behind_best([small, large], 0.95)[large.name].mean == pytest.approx(0.35)


def test_forgetting_is_the_mean_of_the_seeds_that_measured_it() -> None:
    points = [
        point(2.0, settings={RANK: 4, SEED: seed}, forgetting=value) for seed, value in enumerate((0.1, None, 0.3))
    ]
    assert over_seeds(points)[0].forgetting == pytest.approx(0.2)
    (unmeasured,) = over_seeds([point(2.0, settings={RANK: 4, SEED: 1})])
    assert unmeasured.forgetting is None


@pytest.mark.parametrize("settings", [{RANK: 4}, {SEED: 1}], ids=["no seed", "seeds alone"])
def test_points_are_compared_as_they_are_without_seeds_or_with_nothing_else(settings: dict[str, Any]) -> None:
    points = [point(2.0, settings=settings), point(2.1, settings=dict.fromkeys(settings, 9))]
    assert over_seeds(points) is points
