"""Checks the configuration of an adapter from elsewhere, before PEFT matches its patterns with the names of modules."""

from pathlib import Path
from typing import Any

from finetune_assets.config.patterns import pattern_problem
from finetune_assets.errors import UserError
from finetune_assets.sources.json_files import read_json_object

ADAPTER_CONFIG, MOST_BYTES, MOST_NAMES, LARGEST_RANK = "adapter_config.json", 16 << 20, 10_000, 65_536
PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
"""Keys whose values are patterns, or lists of names or of patterns."""
MATCHED = ("rank_pattern", "alpha_pattern", "layers_pattern")
"""Keys of which also the names in a list are patterns."""


class AdapterConfigError(UserError):
    """The configuration of an adapter is not supported."""


def check_adapter(folder: Path) -> None:
    """Check the sizes and patterns of an adapter's configuration.

    Raises:
        AdapterConfigError: naming the file, the key and its value.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return  # loading reports it
    config = read_json_object(path, f"{path}:", AdapterConfigError, "copy the adapter again", MOST_BYTES)
    for key in (*PATTERNS, "layers_to_transform"):
        value = config.get(key)
        if isinstance(value, list | dict) and len(value) > MOST_NAMES:
            raise AdapterConfigError(f"{path}: {key} has {len(value):,} entries; at most {MOST_NAMES:,} are supported")
    for key in PATTERNS:
        for pattern in _patterns(config.get(key), key in MATCHED):
            if problem := pattern_problem(pattern):
                raise AdapterConfigError(f"{path}: {key} '{pattern[:200]}': {problem}")
    ranks = [
        config.get("r"),
        *(config["rank_pattern"].values() if isinstance(config.get("rank_pattern"), dict) else ()),
    ]
    if rank := next((rank for rank in ranks if isinstance(rank, int | float) and rank > LARGEST_RANK), None):
        raise AdapterConfigError(f"{path}: a rank of {rank:,}; at most {LARGEST_RANK:,} is supported")


def _patterns(value: Any, in_lists: bool) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [name for name in value or () if isinstance(name, str)] if in_lists else []
