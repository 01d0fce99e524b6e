"""Fingerprints: hashes of settings in canonical form and of all other inputs that determine an artifact's bytes.

Fields that the schema marks `not_identity` are excluded, and those that it marks `added` while they have their default.
Comments, key order and formatting of a YAML file have no effect. `artifacts/kinds.py` defines the inputs of each kind's
fingerprint.
"""

import hashlib
import json
from dataclasses import Field, fields, is_dataclass
from typing import Any

from finetune_assets.config.fields import default_of


def fingerprint(**parts: Any) -> str:
    """sha256 (64 hex digits) of `parts` in canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def identity(settings: Any, added: bool = True) -> Any:
    """A group of settings as plain data, without the fields that cannot change an artifact's bytes.

    Args:
        settings: The settings.
        added: Include fields that a later version of the schema added, where they do not have their default.
    """
    if not is_dataclass(settings):
        return settings
    kept = (field for field in fields(settings) if _counts(field, getattr(settings, field.name), added))
    return {field.name: identity(getattr(settings, field.name), added) for field in kept}


def _counts(field: "Field[Any]", value: Any, added: bool) -> bool:
    if field.metadata.get("added"):
        return added and bool(value != default_of(field))
    return bool(field.metadata.get("identity", True))
