"""Plots of the weight update of an adapter, by module."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune_assets.artifacts.update_spectrum import Update
from finetune_assets.plots.style import SMALL, TEXT, WIDTH, new_figure

MOST_WRITTEN = 16
"""Maximum number of layers for which values are printed in the cells."""


def updates(module_updates: Sequence[Update], title: str = "") -> Any:
    """Plot norm and effective rank of each module's update as heatmaps with one column per layer."""
    kinds = list(dict.fromkeys(update.kind for update in module_updates))
    layers = sorted({update.layer for update in module_updates if update.layer is not None}) or [0]
    figure, panels = new_figure(0.3 * len(kinds) * 2 + 1.6, rows=2, width=max(WIDTH, 0.25 * len(layers)))
    for panel, (label, attribute) in zip(
        panels, (("norm of the update", "norm"), ("effective rank", "effective_rank")), strict=True
    ):
        grid = np.full((len(kinds), len(layers)), np.nan)
        for update in module_updates:
            column = layers.index(update.layer) if update.layer is not None else 0
            grid[kinds.index(update.kind), column] = getattr(update, attribute)
        _heatmap(figure, panel, grid)
        panel.set_yticks(range(len(kinds)), kinds)
        stride = max(1, len(layers) // 20)
        panel.set_xticks(range(0, len(layers), stride), layers[::stride])
        panel.set_title(label, fontsize=TEXT)
    panels[-1].set_xlabel("layer")
    if title:
        figure.suptitle(title)
    return figure


def _heatmap(figure: Any, panel: Any, grid: np.ndarray) -> None:  # type: ignore[type-arg]
    panel.grid(visible=False)
    image = panel.imshow(grid, aspect="auto", cmap="cividis")
    figure.colorbar(image, ax=panel).ax.tick_params(labelsize=SMALL)
    if grid.shape[1] > MOST_WRITTEN:
        return
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if value <= middle else "black"
            panel.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=SMALL, color=colour)
