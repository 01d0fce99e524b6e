"""JSON files of models and adapters from elsewhere."""

import json
from pathlib import Path
from typing import Any

from finetune_assets.errors import UserError


def read_json_object(
    path: Path, where: str, error: type[UserError], advice: str, most: int | None = None
) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        where: Name of the file, for the error message.
        error: Type of the error.
        advice: What to do if the file is damaged.
        most: Maximum size in bytes; None for no limit.

    Raises:
        UserError: of the given type, if the file is too large or not a JSON object.
    """
    if most is not None and (size := path.stat().st_size) > most:
        raise error(f"{where} {size:,} bytes; at most {most:,} are supported")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise error(f"{where} is not JSON ({e}); {advice}") from e
    if not isinstance(tree, dict):
        raise error(f"{where} is not a JSON object; {advice}")
    return tree
