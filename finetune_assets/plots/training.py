"""Plots of a training run: loss curves and GPU utilization."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.plots.data import shortened
from finetune_assets.plots.style import COLOURS, ON_WHITE, SMALL, TEXT, Look, dress, legend, losses, new_figure

MARKED = 40
"""Maximum number of reports drawn with point markers."""


def curves(state: Mapping[str, Any]) -> Any:
    """Plot loss, held-out loss and learning rate by step, with the gradient norm below.

    Args:
        state: Content of `trainer_state.json`.
    """
    history = state["history"]
    steps = [entry["step"] for entry in history]
    mark = "." if len(steps) <= MARKED else ""
    figure, (above, below) = new_figure(4.4, rows=2, sharex=True, height_ratios=[2, 1])
    above.plot(steps, [entry["loss"] for entry in history], color=COLOURS[0], marker=mark, label="training loss")
    measured = held_out(state)
    if measured:
        # A line needs values from within the training: nothing is known between the first and the last value
        between = "-" if len(measured) > 2 else ""
        style = {"color": COLOURS[1], "marker": "o", "markersize": 4, "linestyle": between}
        above.plot(*zip(*measured, strict=True), **style, label="held-out loss")
    best = state.get("best") or {}
    if best.get("is_published"):
        above.axvline(
            best["step"], color=COLOURS[1], linestyle="--", linewidth=1, label=f"published: step {best['step']}"
        )
    losses(above, [entry["loss"] for entry in history], "loss, nats per token")
    rate = above.twinx()
    dress(rate)
    rate.grid(visible=False)
    rate.spines["right"].set_visible(True)
    rate.plot(steps, [entry["learning_rate"] for entry in history], color=COLOURS[7], linestyle=":")
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning rate", fontsize=TEXT, color=COLOURS[7])
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.yaxis.get_offset_text().set_fontsize(SMALL)
    above.plot([], [], color=COLOURS[7], linestyle=":", label="learning rate")
    legend(above)
    below.plot(steps, [entry["grad_norm"] for entry in history], color=COLOURS[2], marker=mark)
    below.set_ylim(bottom=0)
    below.set_ylabel("gradient norm")
    below.set_xlabel("step")
    return figure


def held_out(state: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Steps and held-out losses, including those before the first and after the last step."""
    ends = state["held_out_loss"]
    during = [(entry["step"], entry["held_out_loss"]) for entry in state["history"] if "held_out_loss" in entry]
    before = [] if ends["before"] is None else [(0, ends["before"])]
    is_last = not (state.get("best") or {}).get("is_published")
    after = [(state["step"], ends["after"])] if is_last and ends["after"] is not None else []
    return [*before, *during, *after]


def utilisation(path: Path) -> Any | None:
    """Plot utilization and memory of each GPU over time, from the CSV file of `Utilisation`; None if it has no rows."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    if not rows:
        return None
    figure, (above, below) = new_figure(3.6, rows=2, sharex=True)
    for index, gpu in enumerate(sorted({row["gpu"] for row in rows}, key=int)):
        colour = COLOURS[index % len(COLOURS)]
        for panel, column, factor in ((above, "utilisation_percent", 1), (below, "memory_mib", 1024)):
            samples = [(float(row["seconds"]), row[column]) for row in rows if row["gpu"] == gpu and row[column]]
            points = [(seconds / 60, float(value) / factor) for seconds, value in samples]
            panel.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=f"GPU {gpu}")
    above.set_ylim(0, 105)
    above.set_ylabel("utilization, %")
    legend(above, loc="lower right", ncols=4)
    below.set_ylim(bottom=0)
    below.set_ylabel("memory, GiB")
    below.set_xlabel("minutes")
    return figure


@dataclass(frozen=True)
class Curve:
    """Loss curve of one training run.

    Attributes:
        name: Label in the legend.
        steps: Steps at which the loss was reported; shape (n,).
        losses: Losses at these steps, in nats per token; shape (n,).
        held_out: Step and held-out loss where it was measured; shape (m, 2).
    """

    name: str
    steps: Sequence[int]
    losses: Sequence[float]
    held_out: Sequence[tuple[int, float]] = ()


def overlaid(shown: Sequence[Curve], look: Look = ON_WHITE) -> Any:
    """Plot loss curves by training progress in percent; the first ones are labeled, the others are grey.

    Held-out losses are dots.
    """
    figure, panel = new_figure(3.4, look=look)
    named = len(COLOURS) - 1  # the last colour is the grey for unlabeled curves
    for curve in shown[named:]:
        panel.plot(_progress_percent(curve), curve.losses, color=COLOURS[-1], linewidth=0.7, alpha=0.4)
    for colour, curve in zip(COLOURS, shown[:named], strict=False):
        panel.plot(_progress_percent(curve), curve.losses, color=colour, linewidth=1.4, label=shortened(curve.name, 36))
        if curve.held_out:
            points = [(100 * step / curve.steps[-1], loss) for step, loss in curve.held_out]
            panel.plot(*zip(*points, strict=True), "o", color=colour, markersize=4, clip_on=False)
    held_out_losses = [loss for curve in shown for _, loss in curve.held_out]
    if held_out_losses:
        panel.plot([], [], "o", color=look.ink, markersize=4, label="held-out loss")
    if others := shown[named:]:
        panel.plot([], [], color=COLOURS[-1], linewidth=0.7, label=f"{len(others)} others")
    panel.set_xlim(0, 100)
    panel.set_xlabel("training progress, %")
    label = "loss, nats per token" if held_out_losses else "training loss, nats per token"
    losses(panel, [*(loss for curve in shown for loss in curve.losses), *held_out_losses], label)
    legend(panel, look)
    return figure


def _progress_percent(curve: Curve) -> list[float]:
    return [100 * step / curve.steps[-1] for step in curve.steps]
