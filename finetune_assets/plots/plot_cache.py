"""Plots that are drawn once: drawing takes longer than all else that a cache hit does."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_assets.store.results import Results, code_and_libraries

LIBRARIES = ("matplotlib", "numpy", "pillow")
PICTURE = "picture"
logger = logging.getLogger(__name__)


def drawn_once(name: str, draw: Callable[[], str | None], drawn: Results, *shown: Any) -> str | None:
    """Return a plot as text, such as a data URI; None without data or if plotting fails.

    A failure is logged and ends nothing, because the numbers in the plot are complete without it.

    Args:
        name: Name of the plot, with its form if it has several.
        draw: Draws it; None if there is nothing to draw.
        drawn: Cache of plots on this machine.
        shown: The data in the plot.
    """
    data = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
    question = {"plot": name, "data": data, **code_and_libraries((Path(__file__).parent,), LIBRARIES)}
    if result := drawn.get(question, {PICTURE}):
        return result[PICTURE]
    try:
        picture = draw()
    except Exception as e:
        logger.warning("Could not draw plot %s: %s: %s", name, type(e).__name__, e)
        return None
    drawn.put(question, {PICTURE: picture})
    return picture
