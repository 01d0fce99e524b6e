"""Plots of preferences."""

from collections.abc import Mapping
from typing import Any

from finetune_assets.plots.style import OF_CONTENDER, ON_WHITE, Look, legend, new_figure


def margins(histograms: Mapping[str, Any], look: Look = ON_WHITE) -> Any:
    """Plot how many held-out judgements have which reward margin, for each contender.

    Args:
        histograms: `edges` of the bins and `counts` by contender, from `evaluation.json`.
        look: Colours of the page.
    """
    figure, panel = new_figure(2.6, look=look)
    for name, counts in histograms["counts"].items():
        panel.stairs(counts, histograms["edges"], color=OF_CONTENDER[name], label=name, fill=True, alpha=0.5)
    panel.axvline(0, color=OF_CONTENDER["base"], linestyle="--", linewidth=1.2, label="base")
    panel.set_xlabel("reward margin: above 0, the model follows the judgement more than the base does")
    panel.set_ylabel("held-out judgements")
    legend(panel, look)
    return figure
