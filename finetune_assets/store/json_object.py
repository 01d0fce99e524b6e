"""Strict parsing of JSON objects from a store that others may write to."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune_assets.errors import UserError

MOST_BYTES = 4 << 20
"""Largest manifest or record, in bytes: that of an artifact of 20,000 files."""
MOST_FILE_BYTES = 64 << 20
"""Largest JSON file of an artifact, in bytes."""
MOST_LEVELS = 32
MOST_INTEGER = 1 << 63
YEARS = range(1970, 3000)


class InvalidJson(UserError, ValueError):
    """Bytes that are not the JSON object that is expected."""


def parse_object(raw: bytes, most: int = MOST_BYTES) -> dict[str, Any]:
    """Parse a JSON object, with limits on size, nesting and integers.

    Args:
        raw: The JSON.
        most: Largest accepted size in bytes.

    Raises:
        InvalidJson: If it is not a JSON object, or exceeds a limit.
    """
    if len(raw) > most:
        raise InvalidJson(f"{len(raw):,} bytes, at most {most:,} are read")
    try:
        tree = json.loads(raw.decode())  # not UTF-16, which json would detect
    except RecursionError:
        raise InvalidJson("nested too deeply") from None
    except ValueError as e:
        raise InvalidJson(f"not JSON: {str(e)[:100]}") from None
    if not isinstance(tree, dict):
        raise InvalidJson(f"not a JSON object but {type(tree).__name__}")
    _check_values(tree)
    return tree


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file of a fetched artifact.

    Args:
        path: The file.
        what: Name of the artifact and what to do, for the error message.

    Raises:
        InvalidJson: If the file is not a JSON object, or exceeds a limit.
    """
    try:
        if (size := path.stat().st_size) > MOST_FILE_BYTES:
            raise InvalidJson(f"{size:,} bytes, at most {MOST_FILE_BYTES:,} are read")
        return parse_object(path.read_bytes(), MOST_FILE_BYTES)
    except InvalidJson as e:
        raise InvalidJson(f"{path.name} of {what}: {e}") from None


def check_types(tree: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Check that an object has all fields with their types. A boolean is not a number.

    Args:
        tree: The object.
        types: Type, or accepted types, of each field.

    Raises:
        InvalidJson: naming the field and its value.
    """
    for name, accepted in types.items():
        if name not in tree:
            raise InvalidJson(f"'{name}' is missing")
        kinds = accepted if isinstance(accepted, tuple) else (accepted,)
        value = tree[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise InvalidJson(f"'{name}' is {type(value).__name__}, not {wanted}: {str(value)[:60]!r}")


def check_time(value: str) -> None:
    """Check that a text is a time with a time zone.

    Raises:
        InvalidJson: If it is not, or of an implausible year.
    """
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise InvalidJson(f"'{value[:60]}' is not a time (ISO 8601)") from None
    if time.tzinfo is None or time.year not in YEARS:
        raise InvalidJson(f"'{value[:60]}' is not a time with a time zone of the years {YEARS[0]} to {YEARS[-1]}")


def _check_values(tree: dict[str, Any]) -> None:
    """Check nesting, integers and texts without recursion."""
    waiting: list[tuple[Any, int]] = [(tree, 1)]
    while waiting:
        value, level = waiting.pop()
        if isinstance(value, dict | list):
            if level > MOST_LEVELS:
                raise InvalidJson(f"nested more than {MOST_LEVELS} levels deep")
            waiting += ((child, level + 1) for child in (value.values() if isinstance(value, dict) else value))
            waiting += ((name, level) for name in value if isinstance(value, dict))
        elif isinstance(value, int) and abs(value) >= MOST_INTEGER:
            raise InvalidJson(f"an integer of {value.bit_length()} bits")
        elif isinstance(value, str) and not _is_text(value):
            raise InvalidJson(f"a text that is not Unicode: {value[:60]!r}")


def _is_text(value: str) -> bool:
    """Whether a text can be written as UTF-8: lone surrogates cannot, and would end any command that prints them."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
