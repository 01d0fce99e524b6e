"""Metadata of settings' fields."""

from dataclasses import MISSING, Field, field
from typing import Any

NOT_IDENTITY = {"identity": False}
ADDED = {"added": True}


def not_identity(default: Any) -> Any:
    """A field that is excluded from every fingerprint."""
    return field(default=default, metadata=NOT_IDENTITY)


def added(default: Any) -> Any:
    """A field that a later version of the schema added, and that has no effect at its default.

    It is part of a fingerprint only with another value, so artifacts of earlier versions are found.
    """
    return field(default=default, metadata=ADDED)


def default_of(setting: "Field[Any]") -> Any:
    """Default value of a field."""
    return setting.default if setting.default_factory is MISSING else setting.default_factory()
