"""Plots of artifacts as metadata, which Dagster's UI renders as images."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts.layout import UPDATES, UTILISATION

logger = logging.getLogger(__name__)
Pictures = dict[str, dg.MarkdownMetadataValue]


def of_rows(statistics: Mapping[str, Any]) -> Pictures:
    """Plot of the lengths and categories of raw rows."""
    from finetune_assets.plots.data import raw_rows

    return _plot("lengths_and_categories", lambda: raw_rows(statistics["quality"]["lengths"], statistics["categories"]))


def of_tokens(statistics: Mapping[str, Any], cutoff: int) -> Pictures:
    """Plot of the lengths of train examples and of the fill of packed sequences."""
    from finetune_assets.plots.data import tokens

    lengths, fills = statistics["length_histogram"], statistics["fill_histogram"]
    return _plot("lengths_and_packing", lambda: tokens(lengths, cutoff, fills))


def of_plan(plan: Mapping[str, Any], measured: float | None = None) -> Pictures:
    """Plot of the predicted memory by part, with the measured peak memory if available; all in MiB."""
    from finetune_assets.plots.memory import by_part

    if not plan["memory_mib"]:
        return {}
    return _plot("memory_by_part", lambda: by_part(plan["memory_mib"], plan["usable_mib"], measured))


def is_drawn(path: str) -> bool:
    """Whether `of_training` reads this file of an adapter."""
    return path in (UPDATES, UTILISATION)


def of_training(folder: Path, state: Mapping[str, Any]) -> Pictures:
    """Plots of a training: curves, GPU utilisation and weight updates by module."""
    from finetune_assets.artifacts.update_spectrum import read_updates
    from finetune_assets.plots import modules, training

    plots = _plot("curves", lambda: training.curves(state))
    if (folder / UTILISATION).is_file():
        plots |= _plot("gpu_utilisation", lambda: training.utilisation(folder / UTILISATION))
    if updates := read_updates(folder):
        plots |= _plot("module_updates", lambda: modules.updates(updates))
    return plots


def of_evaluation(evaluation: Mapping[str, Any]) -> Pictures:
    """Plots of held-out losses by category and, where they are measured, of retrieval modes and reward margins."""
    from finetune_assets.plots.bars import by_category, by_mode
    from finetune_assets.plots.preferences import margins

    categories, modes = evaluation["categories"], evaluation.get("modes", {})
    plots = _plot("loss_by_category_bars", lambda: by_category(categories, [*evaluation["contenders"]]))
    if modes:
        plots |= _plot("modes_side_by_side", lambda: by_mode(modes))
    if histograms := evaluation.get("preferences", {}).get("margins"):
        plots |= _plot("reward_margins", lambda: margins(histograms))
    return plots


def _plot(name: str, draw: Callable[[], Any]) -> Pictures:
    """A plot by its name; empty without data or if plotting fails, because the artifact itself is complete by then."""
    from finetune_assets.plots.style import as_markdown

    try:
        figure = draw()
        return {} if figure is None else {name: dg.MetadataValue.md(as_markdown(figure, name.replace("_", " ")))}
    except Exception as e:
        logger.warning("Could not draw plot %s: %s: %s", name, type(e).__name__, e)
        return {}
