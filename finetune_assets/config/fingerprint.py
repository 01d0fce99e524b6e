"""Fingerprints: hashes of settings in canonical form and of all other inputs that determine an artifact's bytes.

Fields that the schema marks `not_identity` are excluded. Comments, key order and formatting of a YAML file have no
effect. `artifacts/kinds.py` defines the inputs of each kind's fingerprint.
"""

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Any


def fingerprint(**parts: Any) -> str:
    """sha256 (64 hex digits) of `parts` in canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def identity(settings: Any) -> Any:
    """A group of settings as plain data, without the fields that cannot change an artifact's bytes."""
    if not is_dataclass(settings):
        return settings
    kept = (field for field in fields(settings) if field.metadata.get("identity", True))
    return {field.name: identity(getattr(settings, field.name)) for field in kept}
