"""Numbered records in the store: append-only files, of which the highest number is current.

A record is one small file that is written only if its number is unused, so history and current record are always
consistent. An interrupted write has no effect, and of two concurrent writers one fails.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.json_object import MOST_BYTES, InvalidJson, check_time, check_types, parse_object

RECORD = re.compile(r"(\d{8})\.json")
Types = Mapping[str, type | tuple[type, ...]]
R = TypeVar("R")


def record_fields(content: bytes, where: str, types: Types, required: Sequence[str]) -> dict[str, Any]:
    """The fields of the record stored at `where`, a key that ends in the record's number.

    Args:
        content: The file.
        where: Its key.
        types: Types of all fields.
        required: Fields that must be present; always among them `number` and `at`, the time.

    Raises:
        InvalidJson: if a field is missing, unknown or of another type, or the number differs from the key.
    """
    tree = parse_object(content)
    check_types(tree, {name: kinds for name, kinds in types.items() if name in tree or name in required})
    if unknown := sorted(tree.keys() - types.keys()):
        raise InvalidJson(f"unknown field '{unknown[0][:60]}'")
    named = RECORD.fullmatch(where.rpartition("/")[2])
    if not named or tree["number"] != int(named[1]):
        raise InvalidJson(f"number {tree['number']} differs from its key")
    check_time(tree["at"])
    return tree


class NumberedRecords(Generic[R]):
    """The records of one experiment.

    Args:
        store: Store of the records.
        folder: Folder of the kind of record.
        experiment: Name of the experiment.
        parse: Parses a record from its content and key.
    """

    def __init__(self, store: ArtifactStore, folder: str, experiment: str, parse: Callable[[bytes, str], R]) -> None:
        self.store, self.parse = store, parse
        self.prefix = f"{store.namespace}/{folder}/{experiment}/"

    def current(self) -> R | None:
        """The newest record, or None."""
        numbers = self.numbers()
        return self.read(numbers[-1]) if numbers else None

    def history(self) -> list[R]:
        """All records, oldest first."""
        return [self.read(number) for number in self.numbers()]

    def numbers(self) -> list[int]:
        names = (stored.key.rpartition("/")[2] for stored in self.store.objects.listing(self.prefix))
        return sorted(int(match[1]) for name in names if (match := RECORD.fullmatch(name)))

    def read(self, number: int) -> R:
        key = self._key(number)
        return self.parse(self.store.objects.get(key, MOST_BYTES), f"{self.store.url}/{key}")

    def create(self, number: int, fields: Mapping[str, Any]) -> bool:
        """Write a record; False if its number is in use."""
        content = json.dumps(fields, indent=1, sort_keys=True).encode()
        return self.store.objects.create(self._key(number), content)

    def _key(self, number: int) -> str:
        return f"{self.prefix}{number:08d}.json"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
