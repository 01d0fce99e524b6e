"""Typed access to the provenance of an artifact, `made_from`; anybody with access to the store may have written it."""

from collections.abc import Mapping
from typing import Any

from finetune_assets.artifacts.layout import HELD_BACK
from finetune_assets.data.rows import HoldoutRows


def text(made_from: Mapping[str, Any], key: str) -> str | None:
    """A text; None if it is missing or of another type."""
    value = made_from.get(key)
    return value if isinstance(value, str) and value else None


def texts(made_from: Mapping[str, Any], key: str) -> list[str]:
    """The texts of a list."""
    value = made_from.get(key)
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def texts_by_name(made_from: Mapping[str, Any], key: str) -> dict[str, str]:
    """The texts of an object, by name."""
    value = made_from.get(key)
    return {name: item for name, item in value.items() if isinstance(item, str)} if isinstance(value, dict) else {}


def held_back(made_from: Mapping[str, Any]) -> HoldoutRows | None:
    """Rows that an adapter was not trained on; None if they are not recorded."""
    value = made_from.get(HELD_BACK)
    if not isinstance(value, dict) or value.keys() != {"salt", "gate", "val"}:
        return None
    fractions = (value["gate"], value["val"])
    if not isinstance(value["salt"], str) or not all(isinstance(part, int | float) for part in fractions):
        return None
    return HoldoutRows(**value)
