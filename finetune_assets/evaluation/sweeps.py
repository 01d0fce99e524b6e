"""Results of a sweep: held-out loss against cost, and the smallest adapter within noise of the best.

A sweep over `training.seed` and other settings compares the other settings: points that differ only in their seed are
one, with the mean loss of each row over the seeds.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetune_assets.artifacts.layout import ROWS, TRAINER_STATE
from finetune_assets.evaluation.files import forgetting_of, read_evaluation
from finetune_assets.evaluation.gate import Gain, paired_gain
from finetune_assets.plots.bars import Cost, losses_by_cost
from finetune_assets.plots.style import save
from finetune_assets.store.json_object import read_json

COSTS = {
    "parameters": ("trainable parameters", 1.0),
    "seconds": ("training, seconds", 1.0),
    "memory": ("peak memory, GiB", 1 / 1024),
}
"""Costs of a point: axis label and display factor by attribute of `Found`."""
SEED = "training.seed"


@dataclass(frozen=True)
class Found:
    """A trained and evaluated point of a sweep.

    Attributes:
        name: Name of the experiment, or of the settings that several seeds share.
        settings: Settings that the point changes.
        rows: Indices of the held-out rows; shape (rows,).
        losses: Summed loss of each row, in nats; shape (rows,).
        tokens: Number of tokens of each row's answer; shape (rows,).
        parameters: Number of trainable parameters.
        seconds: Training time, in seconds.
        memory: Peak memory, in MiB.
        forgetting: Increase in loss over the base on general text, in nats per token; None if not measured.
        of_seeds: Mean held-out loss with each seed, lowest first; empty if the point has one seed of its own.
    """

    name: str
    settings: dict[str, Any]
    rows: NDArray[np.int64]
    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    parameters: int
    seconds: float
    memory: int
    forgetting: float | None
    of_seeds: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Mean held-out loss, in nats per token."""
        return float(self.losses.sum() / self.tokens.sum())


def found(name: str, settings: dict[str, Any], adapter: Path, evaluation: Path) -> Found:
    """Read a point of a sweep from the folders of its adapter and evaluation."""
    state = read_json(adapter / TRAINER_STATE, f"adapter of {name}")
    table = pq.read_table(evaluation / ROWS)
    return Found(
        name,
        settings,
        table["row"].to_numpy(),
        table["challenger"].to_numpy(),
        np.asarray(table["tokens"].to_numpy(), np.int64),
        state["trainable_parameters"],
        state["seconds"],
        state["peak_memory_mib"],
        forgetting_of(read_evaluation(evaluation)),
    )


def over_seeds(points: list[Found]) -> list[Found]:
    """Merge points that differ only in their seed; their memory is the highest, all else the mean.

    Without other settings in the grid, the seeds are what is compared, and the points stay as they are.
    """
    if SEED not in points[0].settings or len(points[0].settings) == 1:
        return points
    groups: dict[str, list[Found]] = {}
    for point in points:
        shared = {setting: value for setting, value in point.settings.items() if setting != SEED}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(replace(point, settings=shared))
    return [_merged(group) for group in groups.values()]


def _merged(seeds: list[Found]) -> Found:
    forgetting = [point.forgetting for point in seeds if point.forgetting is not None]
    return replace(
        seeds[0],
        name=_point_label(seeds[0]),
        losses=np.mean([point.losses for point in seeds], axis=0),
        seconds=float(np.mean([point.seconds for point in seeds])),
        memory=max(point.memory for point in seeds),
        forgetting=float(np.mean(forgetting)) if forgetting else None,
        of_seeds=tuple(sorted(point.loss for point in seeds)),
    )


def frontier(points: list[Found], cost: str) -> list[Found]:
    """Return the Pareto frontier of loss and cost, cheapest first."""
    pareto: list[Found] = []
    for point in sorted(points, key=lambda point: (getattr(point, cost), point.loss)):
        if not pareto or point.loss < pareto[-1].loss:
            pareto.append(point)
    return pareto


def behind_best(points: list[Found], confidence: float) -> dict[str, Gain]:
    """Return the gain of the best point over each point, by name; a lower bound of 0 or less may be noise."""
    best = min(points, key=lambda point: point.loss)
    return {point.name: _gain(best, point, confidence) for point in points}


def _gain(best: Found, point: Found, confidence: float) -> Gain:
    if np.array_equal(best.rows, point.rows):
        return paired_gain(point.losses, best.losses, best.tokens, confidence)
    _, best_index, point_index = np.intersect1d(best.rows, point.rows, return_indices=True)  # data settings may differ
    return paired_gain(point.losses[point_index], best.losses[best_index], best.tokens[best_index], confidence)


def smallest(points: list[Found], behind: dict[str, Gain]) -> Found:
    """Return the point with the fewest trainable parameters among those within noise of the best."""
    within_noise = [point for point in points if behind[point.name].lower <= 0]
    return min(within_noise, key=lambda point: (point.parameters, point.loss))


def draw(points: list[Found], chosen: Found, title: str, path: Path) -> None:
    """Plot loss against each cost with the Pareto frontier, marking the smallest point within noise of the best."""
    costs = [_cost(points, chosen, cost) for cost in COSTS]
    save(losses_by_cost(costs, title, f"smallest within noise: {_point_label(chosen)}"), path)


def _cost(points: list[Found], chosen: Found, cost: str) -> Cost:
    label, factor = COSTS[cost]

    def at(point: Found) -> tuple[float, float]:
        return getattr(point, cost) * factor, point.loss

    labeled = [(*at(point), _point_label(point)) for point in points]
    return Cost(label, labeled, [*map(at, frontier(points, cost))], at(chosen), log=cost == "parameters")


def _point_label(point: Found) -> str:
    return ", ".join(f"{setting.rpartition('.')[2]} {value}" for setting, value in point.settings.items())
