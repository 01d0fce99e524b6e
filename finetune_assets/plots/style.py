"""What all pictures share: colours that everybody can tell apart, and how a figure becomes a file.

matplotlib is imported in functions, as definitions load without it, and never its pyplot, which keeps what it draws.
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6bb1", "#767676")
"""Okabe and Ito's, without black and yellow, which one of a light and a dark page swallows."""
OF_CONTENDER = {"base": "#767676", "champion": "#e69f00", "challenger": "#0072b2"}
WIDTH = 8.0
"""Inches; at `DPI` as wide as Dagster shows metadata."""
DPI = 100
TEXT, SMALL = 9, 8
PALETTE = 64
SPREAD = 20
"""Times the smallest loss that the largest must be for a log scale."""


@dataclass(frozen=True)
class Look:
    """What a picture is drawn on.

    Attributes:
        ink: Of text and axes.
        paper: Of the background; `none` lets the page shine through.
    """

    ink: str
    paper: str


ON_WHITE = Look("#333333", "white")
ON_ANY_PAGE = Look("#808080", "none")
"""Readable on a light page and on a dark one."""


def new_figure(height: float, rows: int = 1, columns: int = 1, look: Look = ON_WHITE, **grid: Any) -> tuple[Any, Any]:
    """A figure and its panels, as an array of that shape without the sides of length 1.

    Args:
        height: In inches.
        rows: Panels below one another.
        columns: Panels beside one another.
        look: What it is drawn on.
        grid: For `Figure.subplots`; `width` is the figure's own, in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(grid.pop("width", WIDTH), height), dpi=DPI, layout="constrained", facecolor=look.paper)
    panels = figure.subplots(rows, columns, squeeze=False, **grid)
    for panel in panels.flat:
        dress(panel, look)
    return figure, panels.squeeze()[()]


def dress(panel: Any, look: Look = ON_WHITE) -> None:
    """Give a panel the style; a second axis of one needs it too."""
    panel.set_facecolor("none")
    panel.tick_params(which="both", colors=look.ink, labelsize=SMALL)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(look.ink)
    for label in (panel.xaxis.label, panel.yaxis.label, panel.title):
        label.set(color=look.ink, fontsize=TEXT)
    panel.grid(axis="y", color=look.ink, alpha=0.2, linewidth=0.6)
    panel.set_axisbelow(True)


def legend(panel: Any, look: Look = ON_WHITE, **where: Any) -> None:
    panel.legend(fontsize=SMALL, frameon=False, labelcolor=look.ink, **where)


def losses(panel: Any, shown: Iterable[float], label: str) -> None:
    """Scale the axis of losses: one that falls from 14 to 0.2 is a flat line where it matters, but on a log scale."""
    known = [value for value in shown if value > 0]
    if known and max(known) > SPREAD * min(known):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
    panel.set_ylabel(label)


def png(figure: Any) -> bytes:
    """In few colours, which makes a third of it: Dagster keeps it in its database."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    file = io.BytesIO()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # once; `savefig` draws a figure with a layout twice
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    picture.quantize(PALETTE, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def svg(figure: Any) -> bytes:
    """The same bytes for the same figure, its text as text."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "finetune-assets", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def save(figure: Any, path: Path) -> None:
    """Write it as what the path ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def as_markdown(figure: Any, what: str) -> str:
    """The picture in a line of Markdown; `what` is read to whoever does not see it."""
    return f"![{what}]({_address(png(figure), 'png')})"


def as_address(figure: Any) -> str:
    """The picture as the address of an HTML image, sharp at any size."""
    return _address(svg(figure), "svg+xml")


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
