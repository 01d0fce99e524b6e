"""Plots of raw rows and of tokenized examples."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_assets.plots.style import COLOURS, SMALL, legend, new_figure

MOST_CATEGORIES = 12


def raw_rows(lengths: Mapping[str, int], categories: Mapping[str, int]) -> Any:
    """Plot the distribution of row lengths and of categories.

    Args:
        lengths: Number of rows by length in characters, in bins of powers of two, as in `Quality.lengths`.
        categories: Number of rows by category, most frequent first.
    """
    figure, (left, right) = new_figure(2.8, columns=2)
    counts = {int(bits): rows for bits, rows in lengths.items()}
    bits = range(min(counts, default=0), max(counts, default=0) + 1)
    left.bar(range(len(bits)), [counts.get(bit, 0) for bit in bits], color=COLOURS[0], width=0.9)
    left.set_xticks(range(len(bits)), [_upper_bound(bit) for bit in bits], rotation=45)
    left.set_xlabel("characters of prompt and response (upper bound)")
    left.set_ylabel("rows")
    names = _most_frequent(categories)
    bars = right.barh(range(len(names)), [*names.values()], color=COLOURS[2])
    right.bar_label(bars, fmt="{:,.0f}", fontsize=SMALL, padding=2)
    right.set_yticks(range(len(names)), [shortened(name) for name in names])
    right.invert_yaxis()
    right.grid(visible=False)
    right.margins(x=0.15)
    right.set_xlabel("rows by category")
    return figure


def _upper_bound(bits: int) -> str:
    return f"{2**bits}" if bits < 10 else f"{2 ** (bits - 10)}k" if bits < 20 else f"{2 ** (bits - 20)}M"


def _most_frequent(categories: Mapping[str, int]) -> dict[str, int]:
    """Return the most frequent categories, with all others as one entry."""
    first = dict([*categories.items()][:MOST_CATEGORIES])
    others = sum(categories.values()) - sum(first.values())
    named = {name or "(none)": rows for name, rows in first.items()}
    return named | ({f"{len(categories) - len(first)} others": others} if others else {})


def shortened(name: str, longest: int = 24) -> str:
    """Shorten a user-defined name for use as a label, and escape `$`, which matplotlib would parse as math."""
    text = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return text.replace("$", r"\$")


def tokens(lengths: Mapping[str, Any], cutoff: int, fills: Sequence[int]) -> Any:
    """Plot the lengths of training examples, and how full the packed sequences are.

    Args:
        lengths: Bin `width` in tokens, and `counts` of the bins starting at 0.
        cutoff: Maximum length of an example, in tokens.
        fills: Number of packed sequences by fill ratio, in bins of equal width from 0 to 1; empty without packing.
    """
    figure, panels = new_figure(2.6, columns=2 if fills else 1)
    left = panels[0] if fills else panels
    width, counts = lengths["width"], lengths["counts"]
    left.bar([width * index for index in range(len(counts))], counts, width, align="edge", color=COLOURS[0])
    left.axvline(cutoff, color=COLOURS[1], linestyle="--", linewidth=1.2, label=f"cutoff_len {cutoff:,}")
    left.set_xlabel("tokens per training example")
    left.set_ylabel("examples")
    left.set_xlim(left=0)
    legend(left)
    if fills:
        share = 100 / len(fills)
        panels[1].bar([share * index for index in range(len(fills))], fills, share, align="edge", color=COLOURS[2])
        panels[1].set_xlim(0, 100)
        panels[1].set_xlabel("fill of packed sequences, %")
        panels[1].set_ylabel("sequences")
    return figure
