"""Pictures of what an adapter changed in each module."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune_assets.artifacts.update_spectrum import Update
from finetune_assets.plots.style import SMALL, TEXT, WIDTH, new_figure

MOST_WRITTEN = 16
"""Layers up to which each number is written into its field."""


def updates(found: Sequence[Update], title: str = "") -> Any:
    """Norm and effective rank of each module, a column a layer."""
    kinds = list(dict.fromkeys(update.kind for update in found))
    layers = sorted({update.layer for update in found if update.layer is not None}) or [0]
    figure, panels = new_figure(0.3 * len(kinds) * 2 + 1.6, rows=2, width=max(WIDTH, 0.25 * len(layers)))
    for panel, (what, attribute) in zip(
        panels, (("norm of the update", "norm"), ("effective rank", "effective_rank")), strict=True
    ):
        grid = np.full((len(kinds), len(layers)), np.nan)
        for update in found:
            at = layers.index(update.layer) if update.layer is not None else 0
            grid[kinds.index(update.kind), at] = getattr(update, attribute)
        _field(figure, panel, grid)
        panel.set_yticks(range(len(kinds)), kinds)
        every = max(1, len(layers) // 20)
        panel.set_xticks(range(0, len(layers), every), layers[::every])
        panel.set_title(what, fontsize=TEXT)
    panels[-1].set_xlabel("layer")
    if title:
        figure.suptitle(title)
    return figure


def _field(figure: Any, panel: Any, grid: np.ndarray) -> None:  # type: ignore[type-arg]
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
