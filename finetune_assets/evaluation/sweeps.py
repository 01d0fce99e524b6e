"""What a sweep found: held-out loss against what it costs, and the smallest adapter that is as good as the best."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetune_assets.artifacts.layout import ROWS, TRAINER_STATE
from finetune_assets.plots.bars import Cost, losses_by_cost
from finetune_assets.plots.style import save
from finetune_assets.evaluation.files import forgetting_of, read_evaluation
from finetune_assets.evaluation.gate import Gain, paired_gain

COSTS = {
    "parameters": ("trainable parameters", 1.0),
    "seconds": ("training, seconds", 1.0),
    "memory": ("peak memory, GiB", 1 / 1024),
}
"""What a point costs: its attribute, how it is called, and by what it is multiplied to be shown."""


@dataclass(frozen=True)
class Found:
    """One point of a sweep after training and evaluation.

    Attributes:
        name: Its experiment.
        settings: What it changes.
        rows: The held-out rows that it was measured on; shape (rows,).
        losses: Its summed loss of each; shape (rows,).
        tokens: Tokens of each row's answer; shape (rows,).
        parameters: Trainable parameters.
        seconds: Of training.
        memory: Peak in MiB.
        forgetting: Nats a token on the general text, if measured.
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

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.losses.sum() / self.tokens.sum())


def found(name: str, settings: dict[str, Any], adapter: Path, evaluation: Path) -> Found:
    """Read what a point's adapter and evaluation say."""
    state = json.loads((adapter / TRAINER_STATE).read_text(encoding="utf-8"))
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


def frontier(points: list[Found], cost: str) -> list[Found]:
    """Those that no other beats in loss without costing more, cheapest first."""
    kept: list[Found] = []
    for point in sorted(points, key=lambda point: (getattr(point, cost), point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def behind_best(points: list[Found], confidence: float) -> dict[str, Gain]:
    """What the best point gains on each, by name; where its lower bound is not above 0, that may be noise."""
    best = min(points, key=lambda point: point.loss)
    return {point.name: _gain(best, point, confidence) for point in points}


def _gain(best: Found, point: Found, confidence: float) -> Gain:
    if np.array_equal(best.rows, point.rows):
        return paired_gain(point.losses, best.losses, best.tokens, confidence)
    _, ours, theirs = np.intersect1d(best.rows, point.rows, return_indices=True)  # where settings of the data differ
    return paired_gain(point.losses[theirs], best.losses[ours], best.tokens[ours], confidence)


def smallest(points: list[Found], behind: dict[str, Gain]) -> Found:
    """The point of the fewest trainable parameters that the best is not better than beyond noise."""
    as_good = [point for point in points if behind[point.name].lower <= 0]
    return min(as_good, key=lambda point: (point.parameters, point.loss))


def draw(points: list[Found], chosen: Found, title: str, path: Path) -> None:
    """Loss against each cost, the frontier as a line, the smallest that is as good as the best marked."""
    costs = [_cost(points, chosen, cost) for cost in COSTS]
    save(losses_by_cost(costs, title, f"smallest within noise: {_short(chosen)}"), path)


def _cost(points: list[Found], chosen: Found, cost: str) -> Cost:
    label, factor = COSTS[cost]

    def at(point: Found) -> tuple[float, float]:
        return getattr(point, cost) * factor, point.loss

    named = [(*at(point), _short(point)) for point in points]
    return Cost(label, named, [*map(at, frontier(points, cost))], at(chosen), log=cost == "parameters")


def _short(point: Found) -> str:
    return ", ".join(f"{setting.rpartition('.')[2]} {value}" for setting, value in point.settings.items())
