"""What there is to see of an artifact, as metadata that Dagster's UI opens as pictures."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts.layout import UPDATES, UTILISATION

logger = logging.getLogger(__name__)
Pictures = dict[str, dg.MarkdownMetadataValue]


def of_rows(statistics: Mapping[str, Any]) -> Pictures:
    """Lengths and categories of raw rows."""
    from finetune_assets.plots.data import raw_rows

    return _drawn(
        "lengths_and_categories", lambda: raw_rows(statistics["quality"]["lengths"], statistics["categories"])
    )


def of_tokens(statistics: Mapping[str, Any], cutoff: int) -> Pictures:
    """Lengths of train examples, and how they are packed."""
    from finetune_assets.plots.data import tokens

    lengths, fills = statistics["length_histogram"], statistics["fill_histogram"]
    return _drawn("lengths_and_packing", lambda: tokens(lengths, cutoff, fills))


def of_plan(plan: Mapping[str, Any], measured: float | None = None) -> Pictures:
    """Memory by part as it was predicted, beside what was measured, in MiB, if it was."""
    from finetune_assets.plots.memory import by_part

    if not plan["memory_mib"]:
        return {}
    return _drawn("memory_by_part", lambda: by_part(plan["memory_mib"], plan["usable_mib"], measured))


def is_drawn(path: str) -> bool:
    """Whether a file of an adapter is one that `of_training` looks at."""
    return path in (UPDATES, UTILISATION)


def of_training(folder: Path, state: Mapping[str, Any]) -> Pictures:
    """Curves of a training, what its GPUs did, and what it changed in each module."""
    from finetune_assets.artifacts.update_spectrum import read_updates
    from finetune_assets.plots import modules, training

    found = _drawn("curves", lambda: training.curves(state))
    if (folder / UTILISATION).is_file():
        found |= _drawn("gpu_utilisation", lambda: training.utilisation(folder / UTILISATION))
    if updates := read_updates(folder):
        found |= _drawn("module_updates", lambda: modules.updates(updates))
    return found


def of_evaluation(evaluation: Mapping[str, Any]) -> Pictures:
    """Held-out loss of each contender by category."""
    from finetune_assets.plots.bars import by_category

    categories = evaluation["categories"]
    return _drawn("loss_by_category_bars", lambda: by_category(categories, [*evaluation["contenders"]]))


def _drawn(name: str, draw: Callable[[], Any]) -> Pictures:
    """A picture by its name; none where nothing is to be drawn, or where it fails: the work itself is done by then."""
    from finetune_assets.plots.style import as_markdown

    try:
        figure = draw()
        return {} if figure is None else {name: dg.MetadataValue.md(as_markdown(figure, name.replace("_", " ")))}
    except Exception as e:
        logger.warning("the picture %s could not be drawn: %s: %s", name, type(e).__name__, e)
        return {}
