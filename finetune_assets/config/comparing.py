"""Two trees of settings, setting by setting."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """One setting that differs, both values as text.

    Attributes:
        setting: Its dotted path.
        before: Its value in the first tree; `ABSENT` where it has none.
        after: Its value in the second.
    """

    setting: str
    before: str
    after: str


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Settings whose values differ, in the order of the first tree, those that only the second has at the end."""
    ours, theirs = dict(_flat(before)), dict(_flat(after))
    groups = {name.rpartition(".")[0] for name in (*ours, *theirs)}
    names = [name for name in ours | theirs if name not in groups]  # `null` beside a group says what its members do
    told = ((name, _text(ours, name), _text(theirs, name)) for name in names)
    return [Difference(*one) for one in told if one[1] != one[2]]


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
