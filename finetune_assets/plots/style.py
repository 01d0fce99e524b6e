"""Style shared by all plots: a colour-blind safe palette, and rendering of figures to files.

matplotlib is imported inside functions, so that loading the definitions does not import it. pyplot is never used: it
keeps a reference to every figure.
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6bb1", "#767676")
"""Palette of Okabe and Ito, without black and yellow, which are invisible on a dark or a light page."""
OF_CONTENDER = {"base": "#767676", "champion": "#e69f00", "challenger": "#0072b2"}
WIDTH = 8.0
"""Width in inches; at `DPI` it equals the width of metadata in the Dagster UI."""
DPI = 100
TEXT, SMALL = 9, 8
PALETTE = 64
SPREAD = 20
"""Minimum ratio of largest to smallest loss for a log scale."""


@dataclass(frozen=True)
class Look:
    """Foreground and background colours of a plot.

    Attributes:
        ink: Colour of text and axes.
        paper: Colour of the background; `none` is transparent.
    """

    ink: str
    paper: str


ON_WHITE = Look("#333333", "white")
ON_ANY_PAGE = Look("#808080", "none")
"""Readable on both light and dark pages."""


def new_figure(height: float, rows: int = 1, columns: int = 1, look: Look = ON_WHITE, **grid: Any) -> tuple[Any, Any]:
    """Create a figure and its panels.

    Args:
        height: Height of the figure, in inches.
        rows: Number of rows of panels.
        columns: Number of columns of panels.
        look: Foreground and background colours.
        grid: Arguments of `Figure.subplots`, and `width` of the figure in inches.

    Returns:
        The figure, and its panels as an array of shape (rows, columns) without dimensions of size 1.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(grid.pop("width", WIDTH), height), dpi=DPI, layout="constrained", facecolor=look.paper)
    panels = figure.subplots(rows, columns, squeeze=False, **grid)
    for panel in panels.flat:
        dress(panel, look)
    return figure, panels.squeeze()[()]


def dress(panel: Any, look: Look = ON_WHITE) -> None:
    """Apply the style to a panel; required for twin axes too."""
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
    """Scale and label a loss axis; wide ranges use a log scale, as a drop from 14 to 0.2 is flat on a linear one."""
    known = [value for value in shown if value > 0]
    if known and max(known) > SPREAD * min(known):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
    panel.set_ylabel(label)


def png(figure: Any) -> bytes:
    """Render a figure as PNG with a reduced palette, a third of the size: Dagster stores it in its database."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    file = io.BytesIO()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # draws once; `savefig` draws a figure with a layout engine twice
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    picture.quantize(PALETTE, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def svg(figure: Any) -> bytes:
    """Render a figure as SVG with selectable text; equal figures give equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "finetune-assets", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})  # draws once, as in `png`
    return file.getvalue()


def save(figure: Any, path: Path) -> None:
    """Save a figure in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def as_markdown(figure: Any, what: str) -> str:
    """Return the figure as a Markdown image with a data URI; `what` is the alternative text."""
    return f"![{what}]({_data_uri(png(figure), 'png')})"


def as_address(figure: Any) -> str:
    """Return the figure as a data URI of an SVG image, for the `src` of an HTML image."""
    return _data_uri(svg(figure), "svg+xml")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
