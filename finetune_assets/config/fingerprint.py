"""Identity as a hash: of settings in canonical form, and of whatever else decides an artifact's bytes.

Fields that the schema marks `not_identity` are left out, and so is every comment, order and spelling of a YAML file.
`artifacts/kinds.py` says what the identity of each kind of artifact is made of.
"""

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Any


def fingerprint(**parts: Any) -> str:
    """sha256 (64 hex digits) of `parts` in canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def identity(settings: Any) -> Any:
    """A group of settings as plain data, without the fields that cannot change the bytes."""
    if not is_dataclass(settings):
        return settings
    kept = (field for field in fields(settings) if field.metadata.get("identity", True))
    return {field.name: identity(getattr(settings, field.name)) for field in kept}
