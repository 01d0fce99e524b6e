"""Sweeps: one file that defines many experiments, which differ in the settings of its grid.

A point's name is its partition key: the sweep's name, then the last word and the value of each setting. A value that
cannot be part of a name is replaced by its index in the grid.
"""

import copy
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_assets.config.errors import ConfigError, shown
from finetune_assets.config.overrides import place
from finetune_assets.config.schema import ExperimentConfig, SweepConfig
from finetune_assets.config.typed_yaml import TypedReader

MOST_POINTS = 1_000
MOST_COMBINATIONS = 2**62
MOST_NAME_CHARACTERS = 200
"""Maximum length of a point's name, which is part of paths in the store."""
MOST_VALUE_CHARACTERS = 60
"""Maximum length of a value in a point's name; longer values are replaced by their index."""
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


class GridReader(TypedReader):
    """Reads a sweep's file, and each value of the grid as the type of its setting."""

    def item_type(self, hint: Any, key: str, name: str, node: yaml.Node) -> Any:
        if key != "grid" or not isinstance(node, yaml.SequenceNode):
            return hint
        try:
            return list[place(ExperimentConfig, name, self.where).hint]  # type: ignore[misc]
        except ConfigError:
            return hint  # `points` refuses it


def points(sweep: str, config: SweepConfig, path: Path) -> list[Point]:
    """The points of a grid, or a seeded sample of them, in the grid's order.

    Raises:
        ConfigError: if the grid is empty, has an unknown setting, a setting without a list of values, or the same value
            twice, or if there are too many points.
    """
    where = str(path)
    if not config.grid:
        raise ConfigError(where, "grid", "no settings; add a setting and its values, such as `lora.rank: [4, 8, 16]`")
    for setting, values in config.grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(where, f"grid.{setting}", f"{shown(values)} must be a list of values")
    if config.sample is not None and config.sample < 1:
        raise ConfigError(where, "sample", f"{config.sample} must be at least 1, or null to use all points")
    choices = [[*enumerate(values)] for values in config.grid.values()]
    count = 1
    for values in choices:
        count *= len(values)
    wanted = min(config.sample or count, count)
    if wanted > MOST_POINTS or count > MOST_COMBINATIONS:
        advice = f"maximum {MOST_POINTS}; set `sample` to draw some"
        raise ConfigError(where, "grid", f"{wanted} points of {count} combinations, {advice}")
    _check_settings(config.grid, where)
    chosen = sorted(random.Random(config.seed).sample(range(count), wanted)) if wanted < count else range(count)
    grid_points = []
    for position in chosen:
        values = _nth(choices, position)
        parts = [_part(setting, *value) for setting, value in zip(config.grid, values, strict=True)]
        settings = dict(zip(config.grid, (value for _, value in values), strict=True))
        grid_points.append(Point(".".join([sweep, *parts]), sweep, config.experiment, settings))
    seen: set[str] = set()
    for point in grid_points:
        if point.name in seen:
            raise ConfigError(where, "grid", f"duplicate point {point.name}; list each value once")
        if len(point.name) > MOST_NAME_CHARACTERS:
            problem = f"the name of a point has {len(point.name)} characters, maximum {MOST_NAME_CHARACTERS}"
            raise ConfigError(where, "grid", f"{problem}: {point.name}; use fewer settings or shorter values")
        if "..." in point.name:
            raise ConfigError(where, "grid", f"the name of a point must not contain '...': {point.name}")
        seen.add(point.name)
    return grid_points


def _check_settings(grid: dict[str, list[Any]], where: str) -> None:
    """Refuse unknown settings, a setting inside another one of the grid, and values that are listed twice."""
    places = {setting: place(ExperimentConfig, setting, where).keys for setting in grid}
    for setting, keys in places.items():
        for other, others in places.items():
            if other != setting and keys[: len(others)] == others:
                raise ConfigError(where, f"grid.{setting}", f"is part of {other}, which is also in the grid")
        seen: dict[str, Any] = {}
        for value in grid[setting]:
            text = _canonical(value)
            if text in seen:
                name = ".".join([Path(where).stem, _part(setting, 0, value)])
                raise ConfigError(where, f"grid.{setting}", f"duplicate point {name}: {shown(value)} is listed twice")
            seen[text] = value


def _canonical(value: Any) -> str:
    """Equal for equal values, also for 1 and 1.0, but not for 1 and true."""
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, sort_keys=True)


def settings_tree(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The tree of a point's settings."""
    tree: dict[str, Any] = {}
    for setting, value in settings.items():
        *groups, last = place(ExperimentConfig, setting, where).keys
        group = tree
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = copy.deepcopy(value)
    return tree


def _nth(choices: list[list[tuple[int, Any]]], place: int) -> list[tuple[int, Any]]:
    """The combination at index `place`, the last setting varying fastest, without generating those before it."""
    combination = []
    for values in reversed(choices):
        place, at = divmod(place, len(values))
        combination.append(values[at])
    return combination[::-1]


def _part(setting: str, index: int, value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    plain = isinstance(value, str | int | float) and PLAIN.fullmatch(text) and "..." not in text
    return f"{setting.rpartition('.')[2]}-{text if plain and len(text) <= MOST_VALUE_CHARACTERS else index}"


def sweep_files(configs: Path) -> Iterator[Path]:
    """Files of all sweeps, sorted by name."""
    folder = configs / "sweeps"
    return (path for path in sorted(folder.iterdir() if folder.is_dir() else []) if path.suffix == ".yaml")
