"""Sweeps: one file that defines many experiments, which differ in the settings of its grid.

A point's name is its partition key: the sweep's name, then the last word and the value of each setting. A value that
cannot be part of a name is replaced by its index in the grid.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.schema import SweepConfig

MOST_POINTS = 1_000
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep.

    Attributes:
        name: Partition key.
        sweep: Name of the sweep.
        experiment: Experiment that provides the other settings.
        settings: Settings of the point, by dotted path.
    """

    name: str
    sweep: str
    experiment: str
    settings: dict[str, Any]


def points(sweep: str, config: SweepConfig, path: Path) -> list[Point]:
    """The points of a grid, or a seeded sample of them, in the grid's order.

    Raises:
        ConfigError: if the grid is empty, a setting has no list of values, or there are too many points.
    """
    if not config.grid:
        raise ConfigError(
            str(path), "grid", "no settings; add a setting and its values, such as `lora.rank: [4, 8, 16]`"
        )
    for setting, values in config.grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(str(path), f"grid.{setting}", f"{values!r} must be a list of values")
    choices = [[*enumerate(values)] for values in config.grid.values()]
    count = 1
    for values in choices:
        count *= len(values)
    wanted = min(config.sample or count, count)
    if wanted > MOST_POINTS:
        raise ConfigError(str(path), "grid", f"{wanted} points, maximum {MOST_POINTS}; set `sample` to draw some")
    chosen = sorted(random.Random(config.seed).sample(range(count), wanted)) if wanted < count else range(count)
    grid_points = []
    for place in chosen:
        values = _nth(choices, place)
        parts = [_part(setting, *value) for setting, value in zip(config.grid, values, strict=True)]
        settings = dict(zip(config.grid, (value for _, value in values), strict=True))
        grid_points.append(Point(".".join([sweep, *parts]), sweep, config.experiment, settings))
    names = [point.name for point in grid_points]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(str(path), "grid", f"duplicate point {twice}; list each value once")
    return grid_points


def _nth(choices: list[list[tuple[int, Any]]], place: int) -> list[tuple[int, Any]]:
    """The combination at index `place`, the last setting varying fastest, without generating those before it."""
    combination = []
    for values in reversed(choices):
        place, at = divmod(place, len(values))
        combination.append(values[at])
    return combination[::-1]


def _part(setting: str, place: int, value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    plain = isinstance(value, str | int | float) and PLAIN.fullmatch(text) and "..." not in text
    return f"{setting.rpartition('.')[2]}-{text if plain else place}"


def sweep_files(configs: Path) -> Iterator[Path]:
    """Files of all sweeps, sorted by name."""
    folder = configs / "sweeps"
    return (path for path in sorted(folder.iterdir() if folder.is_dir() else []) if path.suffix == ".yaml")
