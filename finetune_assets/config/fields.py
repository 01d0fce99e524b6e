"""Metadata of settings' fields."""

from dataclasses import MISSING, Field, field
from typing import Any

NOT_IDENTITY = {"identity": False}
ADDED = {"added": True}
IN_FILE_ONLY = {"in_file_only": True}
"""Metadata of a setting that names code to run, or decides as whom and beside which secrets a job runs.

It must be written in a file of the configuration, which is reviewed as code is, and is refused as an override of one
run: everyone who reaches Dagster's UI may launch runs with overrides.
"""


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
