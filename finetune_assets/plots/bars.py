"""Pictures that compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_assets.plots.data import MOST_CATEGORIES, shortened
from finetune_assets.plots.style import COLOURS, OF_CONTENDER, ON_WHITE, SMALL, Look, legend, new_figure


def by_category(categories: Sequence[Mapping[str, Any]], contenders: Sequence[str]) -> Any:
    """Held-out loss of each contender, a group of bars a category, those of most rows first.

    Args:
        categories: As `evaluation.json` has them: `category`, `rows`, and each contender's loss or None.
        contenders: In the order of the bars.
    """
    shown = sorted(categories, key=lambda one: -one["rows"])[:MOST_CATEGORIES]
    figure, panel = new_figure(0.7 + 0.22 * (len(contenders) + 0.5) * max(len(shown), 2))
    names = [f"{shortened(one['category'] or '(none)')}, {one['rows']:,} rows" for one in shown]
    return _grouped(figure, panel, names, {who: [one[who] for one in shown] for who in contenders}, ON_WHITE)


def by_experiment(losses: Mapping[str, Mapping[str, float | None]], look: Look = ON_WHITE) -> Any:
    """Held-out loss of base, champion and challenger, a group of bars an experiment."""
    figure, panel = new_figure(0.7 + 0.6 * max(len(losses), 2), look=look)
    series = {who: [found.get(who) for found in losses.values()] for who in OF_CONTENDER}
    told = {who: values for who, values in series.items() if any(value is not None for value in values)}
    return _grouped(figure, panel, [shortened(name, 36) for name in losses], told, look)


def _grouped(
    figure: Any, panel: Any, names: Sequence[str], series: Mapping[str, Sequence[float | None]], look: Look
) -> Any:
    height = 0.8 / max(len(series), 1)
    for place, (who, values) in enumerate(series.items()):
        at = [row + (place - (len(series) - 1) / 2) * height for row in range(len(names))]
        bars = panel.barh(at, [value or 0.0 for value in values], height, color=OF_CONTENDER[who], label=who)
        told = ["" if value is None else f"{value:.3f}" for value in values]
        panel.bar_label(bars, told, fontsize=SMALL, padding=2, color=look.ink)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.grid(visible=False)
    panel.margins(x=0.1)
    panel.set_xlabel("held-out loss, nats a token (less is better)")
    legend(panel, look, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


@dataclass(frozen=True)
class Cost:
    """Loss against one cost.

    Attributes:
        label: Of the cost.
        points: Cost, loss and name of each; shape (n, 3).
        frontier: Cost and loss of those that no other beats; shape (m, 2).
        marked: Cost and loss of the one that is marked.
        log: Whether the costs are of several magnitudes.
    """

    label: str
    points: Sequence[tuple[float, float, str]]
    frontier: Sequence[tuple[float, float]]
    marked: tuple[float, float]
    log: bool = False


def losses_by_cost(costs: Sequence[Cost], title: str, marked: str) -> Any:
    """Loss against each cost, the frontier as a line, one point marked by a ring that `marked` explains."""
    figure, panels = new_figure(4.2, columns=len(costs), width=13.0, sharey=True)
    for panel, cost in zip(panels, costs, strict=True):
        panel.plot(*zip(*cost.frontier, strict=True), color=COLOURS[0], zorder=1)
        panel.scatter(*zip(*((x, y) for x, y, _ in cost.points), strict=True), color=COLOURS[0], zorder=2, s=28)
        ring = {"facecolor": "none", "edgecolor": COLOURS[1], "s": 150, "linewidth": 2}
        panel.scatter(*cost.marked, zorder=3, label=marked, **ring)
        for x, y, name in cost.points:
            panel.annotate(name, (x, y), xytext=(4, 5), textcoords="offset points", fontsize=SMALL)
        panel.set_xlabel(cost.label)
        if cost.log:
            panel.set_xscale("log")
    panels[0].set_ylabel("held-out loss, nats a token")
    legend(panels[0], loc="upper right")
    figure.suptitle(title)
    return figure
