"""Histories of an experiment in the store: its champions, and what its servers answered with."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from finetune_assets.artifacts.champions import Record
from finetune_assets.artifacts.records import RECORD
from finetune_assets.serving.state import Served

SHOWN = 20
"""Number of newest records that are shown."""
R = TypeVar("R")


@dataclass(frozen=True)
class History(Generic[R]):
    """The newest records of one experiment.

    Attributes:
        records: The records, newest first, without those that cannot be read.
        older: Number of older records that are not shown.
        current: The newest record; None if there is none, or if it cannot be read.
    """

    records: tuple[R, ...] = ()
    older: int = 0
    current: R | None = None


def keys_by_experiment(keys: Iterable[str], prefix: str) -> dict[str, list[str]]:
    """Return the keys of the records below a prefix by experiment, newest first."""
    numbered: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        experiment, slash, name = key.removeprefix(prefix).partition("/")
        if key.startswith(prefix) and slash and RECORD.fullmatch(name):
            numbered[experiment].append(key)
    return {experiment: sorted(found, reverse=True) for experiment, found in numbered.items()}


def read_history(newest_first: list[str], read: Callable[[str], R | None]) -> History[R]:
    """Read the newest records; `read` returns None for one that is invalid."""
    shown = [read(key) for key in newest_first[:SHOWN]]
    records = tuple(record for record in shown if record is not None)
    return History(records, len(newest_first[SHOWN:]), shown[0] if shown else None)


def gain(record: Record) -> str:
    """Gain that a promotion was decided by, with its lower bound; empty if none was measured."""
    numbers = record.numbers
    for name, form in (("preference_gain", "{:+.1%}"), ("mean", "{:+.4f}")):
        if (mean := _number(numbers, name)) is not None:
            lower = _number(numbers, "lower" if name == "mean" else f"{name}_lower")
            return form.format(mean) + ("" if lower is None else f" (lower bound {form.format(lower)})")
    return ""


def verifications(record: Served) -> list[str]:
    """What was measured of each server when the adapter was verified; empty if no server was asked."""
    texts = []
    for server, numbers in record.numbers.items():
        measured = numbers if isinstance(numbers, dict) else {}
        distance, tolerance, rows = (
            _number(measured, name) for name in ("distance_to_challenger", "tolerance", "rows")
        )
        if distance is None:
            texts.append(f"{server}: not measured")
            continue
        counted = "" if rows is None else f" on {rows:,.0f} rows"
        limit = "" if tolerance is None else f" (at most {tolerance:g})"
        texts.append(f"{server}: {distance:.2g} nats/token{counted}{limit}")
    return texts


def _number(numbers: dict[str, Any], name: str) -> float | None:
    """A number of a record, whose values anybody with access to the store may have written."""
    value = numbers.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
