"""Plots of artifacts as metadata, which Dagster's UI renders as images."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts.layout import UPDATES, UTILISATION
from finetune_assets.plots.plot_cache import drawn_once
from finetune_assets.reporting.numbers import in_order
from finetune_assets.store.results import Results

Pictures = dict[str, dg.MarkdownMetadataValue]


def of_rows(statistics: Mapping[str, Any], drawn: Results) -> Pictures:
    """Plot of the lengths and categories of raw rows.

    Args:
        statistics: Statistics of the raw data.
        drawn: Cache of plots; of all functions here.
    """
    lengths, categories = statistics["quality"]["lengths"], statistics["categories"]

    def draw() -> Any:
        from finetune_assets.plots.data import raw_rows

        return raw_rows(lengths, categories)

    return _plot("lengths_and_categories", draw, drawn, lengths, categories)


def of_tokens(statistics: Mapping[str, Any], cutoff: int, drawn: Results) -> Pictures:
    """Plot of the lengths of train examples and of the fill of packed sequences."""
    lengths, fills = statistics["length_histogram"], statistics["fill_histogram"]

    def draw() -> Any:
        from finetune_assets.plots.data import tokens

        return tokens(lengths, cutoff, fills)

    return _plot("lengths_and_packing", draw, drawn, lengths, cutoff, fills)


def of_plan(plan: Mapping[str, Any], drawn: Results, measured: float | None = None) -> Pictures:
    """Plot of the predicted memory by part, with the measured peak memory if available; all in MiB."""
    parts, usable = plan["memory_mib"], plan["usable_mib"]

    def draw() -> Any:
        from finetune_assets.plots.memory import by_part

        return by_part(parts, usable, measured)

    return _plot("memory_by_part", draw, drawn, parts, usable, measured) if parts else {}


def is_drawn(path: str) -> bool:
    """Whether `of_training` reads this file of an adapter."""
    return path in (UPDATES, UTILISATION)


def of_training(folder: Path, state: Mapping[str, Any], drawn: Results) -> Pictures:
    """Plots of a training: curves, GPU utilisation and weight updates by module."""
    from finetune_assets.artifacts.update_spectrum import read_updates

    def curves() -> Any:
        from finetune_assets.plots import training

        return training.curves(state)

    def utilisation() -> Any:
        from finetune_assets.plots import training

        return training.utilisation(folder / UTILISATION)

    def updates() -> Any:
        from finetune_assets.plots import modules

        return modules.updates(of_modules) if (of_modules := read_updates(folder)) else None

    pictures = _plot("curves", curves, drawn, state)
    for name, file, draw in (("gpu_utilisation", UTILISATION, utilisation), ("module_updates", UPDATES, updates)):
        if (folder / file).is_file():
            pictures |= _plot(name, draw, drawn, hashlib.sha256((folder / file).read_bytes()).hexdigest())
    return pictures


def of_evaluation(evaluation: Mapping[str, Any], drawn: Results) -> Pictures:
    """Plots of held-out losses by category and, where they are measured, of retrieval modes and reward margins."""
    categories, contenders = evaluation["categories"], in_order(evaluation["contenders"])
    modes, histograms = evaluation.get("modes", {}), evaluation.get("preferences", {}).get("margins")

    def losses() -> Any:
        from finetune_assets.plots.bars import by_category

        return by_category(categories, contenders)

    def side_by_side() -> Any:
        from finetune_assets.plots.bars import by_mode

        return by_mode(modes)

    def margins() -> Any:
        from finetune_assets.plots.preferences import margins

        return margins(histograms)

    pictures = _plot("loss_by_category_bars", losses, drawn, categories, contenders)
    if modes:
        pictures |= _plot("modes_side_by_side", side_by_side, drawn, modes)
    if histograms:
        pictures |= _plot("reward_margins", margins, drawn, histograms)
    return pictures


def _plot(name: str, draw: Callable[[], Any], drawn: Results, *shown: Any) -> Pictures:
    """A plot by its name; empty without data, or if plotting fails.

    Args:
        name: Name of the plot.
        draw: Draws it.
        drawn: Cache of plots.
        shown: The data in the plot.
    """

    def picture() -> str | None:
        from finetune_assets.plots.style import as_markdown

        figure = draw()
        return None if figure is None else as_markdown(figure, name.replace("_", " "))

    shown_picture = drawn_once(name, picture, drawn, *shown)
    return {name: dg.MetadataValue.md(shown_picture)} if shown_picture else {}
