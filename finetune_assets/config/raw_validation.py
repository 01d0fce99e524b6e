"""Validates the raw data settings, and what all settings have in common."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from finetune_assets.config.cluster import AUTO
from finetune_assets.config.raw_data_schema import PACKAGED_ROWS, RawDataConfig, RawSource
from finetune_assets.display import shown_url

Problem = tuple[str, str]
"""Dotted path of the setting, and description of the problem."""
PROCESSES = re.compile("[1-9][0-9]{0,5}")
MOST_PROCESSES = 256
"""Maximum number of processes that prepare data on one machine."""
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def impossible_raw_settings(config: RawDataConfig) -> Iterator[Problem]:
    """All problems of the raw data settings."""
    checks = {name: value for name, value in named("checks", config.checks).items() if not isinstance(value, str)}
    yield from shares({"max_quarantine_share": config.max_quarantine_share, **checks})
    arrivals = named("arrivals", config.arrivals)
    for key, number in arrivals.items():
        if number is not None and not 0 <= number < math.inf:
            yield key, f"{number} must be 0 or more"
    yield from data_processes("processes", config.processes)
    yield from address_problems("source", config.source)
    yield from column_problems("columns", config.columns)
    for name, source in config.sources.items():
        yield from _raw_source(f"sources.{name}", name, source)
    weighted = [name for name, source in config.sources.items() if source.weight is not None]
    if weighted and len(weighted) < len(config.sources):
        without = next(name for name in config.sources if name not in weighted)
        yield f"sources.{without}.weight", "must be set, because other sources have a weight; set it for all or none"


def _raw_source(key: str, name: str, source: RawSource) -> Iterator[Problem]:
    if not SOURCE_NAME.fullmatch(name):
        yield key, f"{name!r} is not a name; use letters, digits, '_' and '-'"
    if name in PACKAGED_ROWS and source.source != name:
        yield key, f"'{name}' is the name of packaged rows, which experiments such as demo use; use another name"
    if not source.source.strip():
        yield f"{key}.source", "is blank; name a file, a folder, s3://bucket/prefix or hf://datasets/owner/name"
    yield from address_problems(f"{key}.source", source.source)
    if source.weight is not None and not 0 < source.weight < math.inf:
        yield f"{key}.weight", f"{source.weight} must be more than 0; to leave the source out, use data.sources"
    if source.max_rows is not None and source.max_rows < 1:
        yield f"{key}.max_rows", f"{source.max_rows} must be at least 1"
    yield from column_problems(f"{key}.columns", source.columns)


def data_processes(key: str, number: str) -> Iterator[Problem]:
    if number != AUTO and not (PROCESSES.fullmatch(number) and int(number) <= MOST_PROCESSES):
        yield key, f"{number!r} must be {AUTO} or a number from 1 to {MOST_PROCESSES}"


def address_problems(key: str, source: str | None) -> Iterator[Problem]:
    """Problems of a source. The URL is stored with every version, so it must not contain credentials."""
    if source and "://" in source and shown_url(source) != source:
        yield (
            key,
            f"'{shown_url(source)}': a URL must contain no user, password, token, query or fragment; set credentials "
            "in the environment (AWS_ACCESS_KEY_ID, HF_TOKEN)",
        )


def column_problems(key: str, columns: Any) -> Iterator[Problem]:
    """Problems of a group of column names."""
    named = [
        (field, name)
        for field, names in asdict(columns).items()
        for name in (names if isinstance(names, list) else [names])
        if name is not None
    ]
    counts = Counter(name for _, name in named)
    for field, name in named:
        if not name.strip():
            yield f"{key}.{field}", f"{name!r} is not a column name; use null for the default name"
        elif counts[name] > 1:
            yield f"{key}.{field}", f"'{name}' is used more than once; each setting needs a different column"


def named(group: str, settings: Any) -> dict[str, Any]:
    return {f"{group}.{name}": value for name, value in asdict(settings).items()}


def shares(shares: dict[str, float]) -> Iterator[Problem]:
    for key, share in shares.items():
        if not 0 <= share <= 1:
            yield key, f"{share} must be a fraction from 0 to 1"
