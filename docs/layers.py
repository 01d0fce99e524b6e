"""The picture of the packages, drawn from the import contract in setup.cfg: `python -m docs.layers`."""

from configparser import ConfigParser
from pathlib import Path

from docs.graph import BOX_HEIGHT, BOX_WIDTH, FILL, MARGIN, box, canvas

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).parent / "images" / "layers.svg"
CONTRACT = "importlinter:contract:layers"


def layers() -> list[list[str]]:
    """Packages from top to bottom; those of one layer do not import each other."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config[CONTRACT]["layers"].split("\n")
    return [[name.strip() for name in line.split("|")] for line in lines if line.strip()]


def draw(target: Path) -> None:
    """Write the picture; the same contract gives the same bytes."""
    rows = layers()
    step, columns = BOX_HEIGHT + MARGIN, max(map(len, rows))
    width, height = columns * (BOX_WIDTH + MARGIN) + MARGIN, len(rows) * step + MARGIN
    with canvas((0, width), (-height, 0), target) as axes:
        for number, names in enumerate(rows):
            for place, name in enumerate(names):
                middle = width / 2 + (place - (len(names) - 1) / 2) * (BOX_WIDTH + MARGIN)
                box(axes, name, (middle, -(number + 0.5) * step - MARGIN / 2), FILL)


if __name__ == "__main__":
    draw(TARGET)
