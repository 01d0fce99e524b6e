"""Which adapter of an experiment is in service: numbered records in the store, the highest of which is current.

Each record is one small file that is put only if its number is not taken, so history and pointer are one thing: there
is no moment at which they disagree, a promotion that dies midway has not happened, and of two at once one is told.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from finetune_assets.artifacts.kinds import ADAPTERS, CHAMPIONS
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import ArtifactMissing, StoreError

PROMOTED, BY_HAND, ROLLED_BACK = "promoted", "promoted by hand", "rolled back"
RECORD = re.compile(r"(\d{8})\.json")


class ChampionMoved(StoreError):
    """Another promotion came first; what was decided was decided against a champion that is no more."""

    retriable = True


@dataclass(frozen=True)
class Record:
    """One line of an experiment's history.

    Attributes:
        experiment: Whose champion it is.
        adapter: Fingerprint of the adapter that serves from here on.
        kind: Kind of that artifact.
        action: `promoted`, `promoted by hand` or `rolled back`.
        against: Fingerprint of the champion that the adapter was measured against; None for the base alone.
        evaluation: Fingerprint of that evaluation, if there was one.
        numbers: What decided.
        reason: In words.
        by: The run or the person.
        at: When (UTC, ISO 8601).
        number: Its place, from 1.
        before: The adapter that served until then.
    """

    experiment: str
    adapter: str
    action: str
    kind: str = ADAPTERS.folder
    against: str | None = None
    evaluation: str | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    by: str = ""
    at: str = ""
    number: int = 0
    before: str | None = None


def parse_record(content: bytes, where: str) -> Record:
    """A record as it was put at `where`, which ends in its number.

    Raises:
        StoreError: if it is none.
    """
    try:
        record = Record(**json.loads(content))
        named = RECORD.fullmatch(where.rpartition("/")[2])
        if not named or record.number != int(named[1]) or not re.fullmatch("[0-9a-f]{64}", record.adapter):
            raise ValueError("it is of another number or names no adapter")
    except (ValueError, TypeError) as e:
        raise StoreError(f"{where}: not a record of a champion ({e}); delete it") from e
    return record


class Champions:
    """The champions of one experiment.

    Args:
        store: Where adapters lie, and the records.
        experiment: Its name.
    """

    def __init__(self, store: ArtifactStore, experiment: str) -> None:
        self.store, self.experiment = store, experiment

    def current(self) -> Record | None:
        """The record of the champion, or None where there was none yet."""
        numbers = self._numbers()
        return self._read(numbers[-1]) if numbers else None

    def history(self) -> list[Record]:
        """Every record, oldest first."""
        return [self._read(number) for number in self._numbers()]

    def champion(self) -> ArtifactRef | None:
        """The adapter in service.

        Raises:
            ArtifactMissing: if it is gone from the store.
        """
        current = self.current()
        return self.adapter(current) if current else None

    def adapter(self, record: Record) -> ArtifactRef:
        """The adapter that a record names.

        Raises:
            ArtifactMissing: if it is gone from the store.
        """
        found = self.store.find(record.kind, record.adapter)
        if found is None:
            raise ArtifactMissing(
                f"champion {record.number} of {self.experiment} is no longer in the store "
                f"({self.store.url}/{self.store.prefix(record.kind, record.adapter)}); roll back to another: "
                f"finetune adapter rollback {self.experiment} --to NUMBER"
            )
        return found

    def withdrawn(self) -> dict[str, Record]:
        """Adapters that a person took out of service, by fingerprint, with the record that did; none that came back."""
        found: dict[str, Record] = {}
        for record in self.history():
            if record.action == ROLLED_BACK and record.before:
                found[record.before] = record
            found.pop(record.adapter, None)
        return found

    def promote(self, record: Record, after: int) -> Record:
        """Append a record that was decided while `after` was the newest.

        Raises:
            ChampionMoved: if another one came first.
        """
        before = self._read(after).adapter if after else None
        record = replace(record, experiment=self.experiment, number=after + 1, before=before, at=_now())
        content = json.dumps(asdict(record), indent=1, sort_keys=True).encode()
        if not self.store.objects.create(self._key(record.number), content):
            raise ChampionMoved(
                f"{self.experiment}: another adapter was promoted meanwhile (record {record.number}); to compare with "
                "it, materialize adapter_evaluation and champion_adapter again"
            )
        return record

    def append(self, make: Callable[[Record | None], Record | None]) -> Record | None:
        """Append what a person wants, however many others do so at once.

        Args:
            make: Given the newest record, the one to follow; None if there is nothing to do.
        """
        while True:
            current = self.current()
            wanted = make(current)
            if wanted is None:
                return None
            try:
                return self.promote(wanted, current.number if current else 0)
            except ChampionMoved:
                continue

    def promote_by_hand(self, adapter: ArtifactRef, reason: str, by: str) -> Record | None:
        """Have an adapter serve because a person says so; None if it does already.

        Raises:
            StoreError: without a reason.
        """
        _need_reason(reason)

        def make(current: Record | None) -> Record | None:
            if current and current.adapter == adapter.fingerprint:
                return None
            against = current.adapter if current else None
            return Record(self.experiment, adapter.fingerprint, BY_HAND, adapter.kind, against, reason=reason, by=by)

        return self.append(make)

    def roll_back(self, reason: str, by: str, to: int | None = None) -> Record:
        """Have an earlier champion serve again.

        Args:
            reason: Why; whoever wonders later finds it in the history.
            by: Who.
            to: Number of its record; by default the one that served before the current and was not rolled back.

        Raises:
            StoreError: without a reason, or if there is no such record.
            ArtifactMissing: if its adapter is gone from the store.
        """
        _need_reason(reason)

        def make(current: Record | None) -> Record:
            target = self._earlier(current, to)
            self.adapter(target)
            return replace(target, action=ROLLED_BACK, reason=f"to {target.number}: {reason}", by=by)

        record = self.append(make)
        assert record is not None
        return record

    def _earlier(self, current: Record | None, to: int | None) -> Record:
        history = self.history()
        if current is None:
            raise StoreError(f"{self.experiment}: nothing was promoted yet, so there is nothing to roll back to")
        if to is None:
            gone = {current.adapter, *self.withdrawn()}
            others = [record for record in history if record.adapter not in gone]
            earlier = [record for record in others if record.adapter == current.before] or others
            if {record.adapter for record in history} == {current.adapter}:
                raise StoreError(f"{self.experiment}: champion {current.number} is the first, there is none before it")
            if not earlier:
                raise StoreError(
                    f"{self.experiment}: no champion before {current.number} that was not rolled back itself; "
                    "--to NUMBER takes any record of the history"
                )
            return earlier[-1]
        target = next((record for record in history if record.number == to), None)
        if target is None:
            raise StoreError(f"{self.experiment}: no record {to}; there are 1 to {len(history)}")
        if target.adapter == current.adapter:
            raise StoreError(f"{self.experiment}: the adapter of record {to} serves already")
        return target

    def _numbers(self) -> list[int]:
        names = (stored.key.rpartition("/")[2] for stored in self.store.objects.listing(self._prefix))
        return sorted(int(match[1]) for name in names if (match := RECORD.fullmatch(name)))

    def _read(self, number: int) -> Record:
        key = self._key(number)
        return parse_record(self.store.objects.get(key), f"{self.store.url}/{key}")

    @property
    def _prefix(self) -> str:
        return f"{self.store.namespace}/{CHAMPIONS.folder}/{self.experiment}/"

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number:08d}.json"


def _need_reason(reason: str) -> None:
    if not reason.strip():
        raise StoreError("--reason is required; it is recorded in the promotion history")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
