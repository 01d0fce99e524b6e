"""Pictures of the pages that explain: boxes in columns, and arrows between them: `python -m docs.diagrams`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.graph import BOX_HEIGHT, BOX_WIDTH, FILL, INK, MARGIN, SOURCE_FILL, box, canvas

IMAGES = Path(__file__).parent / "images"
COLUMN, ROW = 2.55, 0.7
Place = tuple[float, float]


@dataclass(frozen=True)
class Diagram:
    """A picture that is read from left to right.

    Attributes:
        boxes: Text and place of each box, in columns and rows from the top left.
        arrows: Names of the boxes that each arrow connects, and its text.
        outside: Boxes that are not part of this project.
    """

    boxes: dict[str, tuple[str, Place]]
    arrows: tuple[tuple[str, str, str], ...]
    outside: tuple[str, ...] = ()


DIAGRAMS = {
    "loop": Diagram(
        {
            "rows": ("new rows,\ndocuments, thumbs", (0, 0)),
            "checks": ("checks", (1, 0)),
            "train": ("training", (2, 0)),
            "gate": ("gate", (3, 0)),
            "serve": ("servers", (3, 2)),
            "users": ("your application", (0, 2)),
            "person": ("alert", (1, 1)),
        },
        (
            ("rows", "checks", ""),
            ("checks", "train", "passed"),
            ("checks", "person", "failed"),
            ("train", "gate", "challenger"),
            ("gate", "serve", "better"),
            ("serve", "users", "verified"),
            ("users", "rows", "judgements"),
        ),
        ("rows", "users"),
    ),
    "promotion": Diagram(
        {
            "base": ("base model", (0, 0)),
            "champion": ("champion", (0, 1)),
            "challenger": ("challenger", (0, 2)),
            "rows": ("evaluation on\nthe gate's rows", (1, 1)),
            "gate": ("lower bound\nof the gain", (2, 1)),
            "yes": ("challenger is\nchampion", (3, 0.4)),
            "no": ("champion stays,\ncheck warns", (3, 1.6)),
        },
        (
            ("base", "rows", ""),
            ("champion", "rows", ""),
            ("challenger", "rows", ""),
            ("rows", "gate", "bootstrap"),
            ("gate", "yes", "> min_gain"),
            ("gate", "no", "otherwise"),
        ),
    ),
    "splits": Diagram(
        {
            "rows": ("rows", (0, 1)),
            "hash": ("hash of\nthe question", (1, 1)),
            "train": ("training rows", (2, 0)),
            "val": ("validation rows", (2, 1)),
            "gate": ("gate rows", (2, 2)),
            "adapter": ("adapter", (3, 0)),
            "step": ("best step, sweeps", (3, 1)),
            "promotion": ("promotion", (3, 2)),
        },
        (
            ("rows", "hash", ""),
            ("hash", "train", ""),
            ("hash", "val", ""),
            ("hash", "gate", ""),
            ("train", "adapter", "learn"),
            ("val", "step", "choose"),
            ("gate", "promotion", "decide"),
        ),
    ),
    "jobs": Diagram(
        {
            "run": ("Dagster's run", (0, 0.5)),
            "launcher": ("launcher", (1, 0.5)),
            "job": ("job: torchrun\non 1..n nodes", (2.2, 0.5)),
            "store": ("store: folder or S3", (2.2, 2)),
            "hub": ("Hub", (0, 2)),
        },
        (
            ("run", "launcher", ""),
            ("launcher", "job", "local, Slurm,\nKubernetes"),
            ("job", "store", "checkpoints,\nadapter"),
            ("hub", "run", "base model"),
        ),
        ("hub",),
    ),
    "artifact": Diagram(
        {
            "inputs": ("fingerprints\nof inputs", (0, 0)),
            "settings": ("settings", (0, 1)),
            "code": ("code version", (0, 2)),
            "name": ("fingerprint", (1, 1)),
            "hit": ("cache hit: reuse", (2.2, 0.4)),
            "make": ("compute files", (2.2, 1.6)),
            "manifest": ("manifest, last", (3.3, 1.6)),
        },
        (
            ("inputs", "name", ""),
            ("settings", "name", ""),
            ("code", "name", ""),
            ("name", "hit", "in the store"),
            ("name", "make", "not there"),
            ("make", "manifest", ""),
        ),
    ),
    "rollout": Diagram(
        {
            "champion": ("champion", (0, 0.5)),
            "copy": ("servable copy,\nnew name", (1, 0.5)),
            "servers": ("each server\nloads it", (2, 0.5)),
            "compare": ("log-probabilities\nas in evaluation?", (3, 0.5)),
            "alias": ("alias moves", (4, 0)),
            "before": ("adapter before\nkeeps serving", (4, 1)),
        },
        (
            ("champion", "copy", ""),
            ("copy", "servers", ""),
            ("servers", "compare", ""),
            ("compare", "alias", "yes"),
            ("compare", "before", "no"),
        ),
    ),
}


def draw(diagram: Diagram, target: Path) -> None:
    """Write the picture; the same diagram gives the same bytes."""
    at = {name: (column * COLUMN, -row * ROW) for name, (_, (column, row)) in diagram.boxes.items()}
    x, y = zip(*at.values(), strict=True)
    x_limits = min(x) - BOX_WIDTH / 2 - MARGIN, max(x) + BOX_WIDTH / 2 + MARGIN
    y_limits = min(y) - BOX_HEIGHT / 2 - MARGIN, max(y) + BOX_HEIGHT / 2 + MARGIN
    with canvas(x_limits, y_limits, target) as axes:
        for begin, end, text in diagram.arrows:
            connect(axes, at[begin], at[end], text)
        for name, (text, _) in diagram.boxes.items():
            box(axes, text, at[name], SOURCE_FILL if name in diagram.outside else FILL)


def connect(axes: Any, begin: Place, end: Place, text: str) -> None:
    """An arrow from the edge of one box to the edge of another, with a text at its middle."""
    from matplotlib.patches import FancyArrowPatch

    beside = begin[0] != end[0]
    width, height = (BOX_WIDTH / 2, 0) if beside else (0, BOX_HEIGHT / 2)
    towards = 1 if (end[0] > begin[0] if beside else end[1] > begin[1]) else -1
    start = begin[0] + towards * width, begin[1] + towards * height
    stop = end[0] - towards * width, end[1] - towards * height
    axes.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=12, color=INK, shrinkA=0, shrinkB=0))
    middle = (start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2
    style = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    axes.text(*middle, text, ha="center", va="center", fontsize=7.5, color=INK, zorder=4, bbox=style if text else None)


if __name__ == "__main__":
    for name, diagram in DIAGRAMS.items():
        draw(diagram, IMAGES / f"{name}.svg")
