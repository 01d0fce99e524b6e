"""The picture of the asset graph, drawn from the definitions themselves: `python -m docs.graph`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "images" / "graph.svg"
SOURCES = {
    "dolly_raw": "rows: packaged,\nfiles, S3, Hub",
    "cached_base_model": "base model:\npackaged, folder, Hub",
}
BOX_WIDTH, BOX_HEIGHT, COLUMN, ROW, MARGIN = 1.8, 0.45, 2.2, 0.75, 0.1
INK, FILL, SOURCE_FILL = "#2a3b4d", "#dfe9f5", "#f3f3ee"

Parents = Mapping[str, set[str]]


def parents_of_assets() -> dict[str, set[str]]:
    """Each asset's parents by name, and each source's node before what reads it."""
    from finetune_assets.definitions import project_definitions

    graph = project_definitions().resolve_asset_graph()
    parents = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    for asset, source in SOURCES.items():
        parents[asset] = parents[asset] | {source}
    return parents | {source: set() for source in SOURCES.values()}


def places(parents: Parents) -> dict[str, tuple[float, float]]:
    """Where each node's centre is: its row is the longest way to it; in a row they are spread about the middle."""

    def row(node: str) -> int:
        return 1 + max(map(row, parents[node])) if parents[node] else 0

    left_first = [*SOURCES, *SOURCES.values()]
    rows: dict[int, list[str]] = {}
    for node in sorted(parents, key=lambda node: (left_first.index(node) if node in left_first else 0, node)):
        rows.setdefault(row(node), []).append(node)
    return {
        node: ((index - (len(nodes) - 1) / 2) * COLUMN, -number * ROW)
        for number, nodes in rows.items()
        for index, node in enumerate(nodes)
    }


def is_indirect(parent: str, child: str, parents: Parents) -> bool:
    """Whether the parent is also reached through another parent of the child."""

    def above(node: str) -> set[str]:
        return parents[node].union(*map(above, parents[node]))

    return any(parent in above(other) for other in parents[child])


def draw(parents: Parents, target: Path) -> None:
    """Write the picture, without arrows that jump over another asset; the same graph gives the same bytes."""
    at = places(parents)
    (left, *_, right), (bottom, *_, top) = (sorted(axis) for axis in zip(*at.values(), strict=True))
    x_limits = left - BOX_WIDTH / 2 - MARGIN, right + BOX_WIDTH / 2 + MARGIN
    y_limits = bottom - BOX_HEIGHT / 2 - MARGIN, top + BOX_HEIGHT / 2 + MARGIN
    with canvas(x_limits, y_limits, target) as axes:
        for child, above in sorted(parents.items()):
            for parent in sorted(above):
                if not is_indirect(parent, child, parents):
                    arrow(axes, at[parent], at[child])
        for node, place in at.items():
            box(axes, node, place, SOURCE_FILL if node in SOURCES.values() else FILL)


@contextmanager
def canvas(x_limits: tuple[float, float], y_limits: tuple[float, float], target: Path) -> Iterator[Any]:
    """Axes of that many inches, written to a file at the end; the same drawing gives the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "finetune_assets"
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(x_limits[1] - x_limits[0], y_limits[1] - y_limits[0]))
    axes = figure.add_axes((0, 0, 1, 1), xlim=x_limits, ylim=y_limits)
    axes.set_axis_off()
    yield axes
    figure.savefig(target, metadata={"Date": None, "Creator": None}, facecolor="white")
    pyplot.close(figure)


def box(axes: Any, text: str, place: tuple[float, float], fill: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = place[0] - BOX_WIDTH / 2, place[1] - BOX_HEIGHT / 2
    style = {"boxstyle": "round,pad=0,rounding_size=0.1", "facecolor": fill, "edgecolor": INK}
    axes.add_patch(FancyBboxPatch(corner, BOX_WIDTH, BOX_HEIGHT, zorder=2, **style))
    axes.text(*place, text, ha="center", va="center", fontsize=9.5, color=INK, zorder=3)


def arrow(axes: Any, begin: tuple[float, float], end: tuple[float, float]) -> None:
    from matplotlib.patches import FancyArrowPatch

    ends = (begin[0], begin[1] - BOX_HEIGHT / 2), (end[0], end[1] + BOX_HEIGHT / 2)
    axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=12, color=INK, shrinkA=0, shrinkB=0))


if __name__ == "__main__":
    draw(parents_of_assets(), TARGET)
