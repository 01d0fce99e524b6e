"""Compares two trees of settings."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = "(absent)"


@dataclass(frozen=True)
class SettingDifference:
    """A setting with different values, both as text.

    Attributes:
        setting: Dotted path of the setting.
        before: Value in the first tree; `ABSENT` if the tree lacks the setting.
        after: Value in the second tree, likewise.
    """

    setting: str
    before: str
    after: str


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[SettingDifference]:
    """Settings that differ, in the order of the first tree, followed by settings of only the second tree."""
    ours, theirs = dict(_flat(before)), dict(_flat(after))
    groups = {name.rpartition(".")[0] for name in (*ours, *theirs)}
    names = [name for name in ours | theirs if name not in groups]  # a `null` group is compared by its members
    rows = ((name, _text(ours, name), _text(theirs, name)) for name in names)
    return [SettingDifference(*row) for row in rows if row[1] != row[2]]


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{path}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _text(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return ABSENT
    value = settings[name]
    plain = isinstance(value, str) and value.isprintable() and value
    return value if plain else json.dumps(value, ensure_ascii=False, default=str)
