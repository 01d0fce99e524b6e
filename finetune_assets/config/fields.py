"""Metadata of settings' fields."""

from dataclasses import field
from typing import Any

NOT_IDENTITY = {"identity": False}


def not_identity(default: Any) -> Any:
    """A field that is excluded from every fingerprint."""
    return field(default=default, metadata=NOT_IDENTITY)
