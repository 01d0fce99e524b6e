"""Plot of the memory of a training run, by part."""

from collections.abc import Mapping
from typing import Any

from finetune_assets.plots.style import COLOURS, SMALL, legend, new_figure

GIB_MIB = 1024
FAR = 3
"""Multiple of the peak above which the usable memory is not drawn as a line: the bar would be too narrow to read."""


def by_part(parts: Mapping[str, float], usable: float, measured: float | None = None) -> Any:
    """Plot predicted memory as a stacked bar, with the usable memory.

    Args:
        parts: Predicted memory by part, in MiB.
        usable: Usable memory, in MiB.
        measured: Measured peak memory in MiB, if the training has finished.
    """
    figure, panel = new_figure(1.7 if measured is None else 2.1)
    left = 0.0
    for colour, (name, size) in zip(COLOURS, parts.items(), strict=False):
        panel.barh(0, size / GIB_MIB, left=left, height=0.6, color=colour, label=f"{name} {size / GIB_MIB:.2f}")
        left += size / GIB_MIB
    rows = ["predicted"]
    if measured is not None:
        bars = panel.barh(1, measured / GIB_MIB, height=0.6, color="#333333")
        panel.bar_label(bars, [f"{measured / GIB_MIB:.2f}"], fontsize=SMALL, padding=2)
        rows.append("measured")
    limit = usable / GIB_MIB
    if limit <= FAR * left:
        panel.axvline(limit, color="black", linestyle="--", linewidth=1)
    panel.set_yticks(range(len(rows)), rows)
    panel.invert_yaxis()
    panel.grid(visible=False)
    panel.margins(x=0.1)
    panel.set_xlabel(f"GiB; {limit:.2f} usable{' (dashed)' if limit <= FAR * left else ''}")
    legend(panel, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return figure
