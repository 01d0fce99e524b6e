"""Plots that compare losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_assets.plots.data import MOST_CATEGORIES, shortened
from finetune_assets.plots.style import COLOURS, OF_CONTENDER, ON_WHITE, SMALL, Look, legend, new_figure

LOSS = "held-out loss, nats per token (lower is better)"


def by_category(categories: Sequence[Mapping[str, Any]], contenders: Sequence[str]) -> Any:
    """Plot the held-out loss of each contender, one group of bars per category, largest categories first.

    Args:
        categories: Categories from `evaluation.json`: `category`, `rows`, and the loss of each contender or None.
        contenders: Names of the contenders, in the order of the bars.
    """
    shown = sorted(categories, key=lambda category: -category["rows"])[:MOST_CATEGORIES]
    figure, panel = new_figure(0.7 + 0.22 * (len(contenders) + 0.5) * max(len(shown), 2))
    names = [f"{shortened(category['category'] or '(none)')}, {category['rows']:,} rows" for category in shown]
    return _grouped_bars(
        figure, panel, names, {name: [category[name] for category in shown] for name in contenders}, ON_WHITE
    )


def by_run(losses: Mapping[str, Mapping[str, float | None]], look: Look = ON_WHITE) -> Any:
    """Plot the held-out loss of base, champion and challenger, one group of bars per run."""
    figure, panel = new_figure(0.7 + 0.6 * max(len(losses), 2), look=look)
    series = {name: [values.get(name) for values in losses.values()] for name in OF_CONTENDER}
    measured = {name: values for name, values in series.items() if any(value is not None for value in values)}
    return _grouped_bars(figure, panel, [shortened(name, 36) for name in losses], measured, look)


def by_mode(modes: Mapping[str, Mapping[str, Any]], look: Look = ON_WHITE) -> Any:
    """Plot loss and exact match of each contender, one group of bars per mode.

    Args:
        modes: `modes` of `evaluation.json`.
        look: Colours of the page.
    """
    contenders = [name for name in OF_CONTENDER if any(name in mode["contenders"] for mode in modes.values())]
    measured = {"loss": LOSS, "exact_match": "exact match on generated answers (higher is better)"}
    shown = {name: label for name, label in measured.items() if {*_of_mode(modes, "challenger", name)} != {None}}
    height = 0.7 + 0.22 * (len(contenders) + 0.5) * max(len(modes), 2)
    figure, panels = new_figure(height, columns=max(len(shown), 1), width=6.5 * max(len(shown), 1), look=look)
    names = [f"{mode.replace('_', ' ')}, {measured['rows']:,} rows" for mode, measured in modes.items()]
    for at, (metric, label) in enumerate(shown.items()):
        panel = panels[at] if len(shown) > 1 else panels
        series = {name: _of_mode(modes, name, metric) for name in contenders}
        _grouped_bars(figure, panel, names if at == 0 else [""] * len(names), series, look, label)
    return figure


def _of_mode(modes: Mapping[str, Mapping[str, Any]], contender: str, metric: str) -> list[float | None]:
    return [mode["contenders"].get(contender, {}).get(metric) for mode in modes.values()]


def _grouped_bars(
    figure: Any,
    panel: Any,
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    look: Look,
    label: str = LOSS,
) -> Any:
    height = 0.8 / max(len(series), 1)
    for index, (contender, values) in enumerate(series.items()):
        positions = [row + (index - (len(series) - 1) / 2) * height for row in range(len(names))]
        bars = panel.barh(
            positions, [value or 0.0 for value in values], height, color=OF_CONTENDER[contender], label=contender
        )
        labels = ["" if value is None else f"{value:.3f}" for value in values]
        panel.bar_label(bars, labels, fontsize=SMALL, padding=2, color=look.ink)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.grid(visible=False)
    panel.margins(x=0.1)
    panel.set_xlabel(label)
    legend(panel, look, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


@dataclass(frozen=True)
class Cost:
    """Points of a plot of loss against one cost.

    Attributes:
        label: Axis label of the cost.
        points: Cost, loss and name of each point; shape (n, 3).
        frontier: Cost and loss of the points on the Pareto frontier; shape (m, 2).
        marked: Cost and loss of the marked point.
        log: Whether to use a logarithmic cost axis.
    """

    label: str
    points: Sequence[tuple[float, float, str]]
    frontier: Sequence[tuple[float, float]]
    marked: tuple[float, float]
    log: bool = False


def losses_by_cost(costs: Sequence[Cost], title: str, marked: str) -> Any:
    """Plot loss against each cost with the Pareto frontier as a line; a ring labeled `marked` highlights one point."""
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
    panels[0].set_ylabel("held-out loss, nats per token")
    legend(panels[0], loc="upper right")
    figure.suptitle(title)
    return figure
