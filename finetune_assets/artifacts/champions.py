"""Champion records of an experiment: numbered files in the store, the highest number is the current champion.

Each record is one small file that is written only if its number is unused, so history and current champion are always
consistent. An interrupted promotion has no effect, and of two concurrent promotions one fails with `ChampionMoved`.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from finetune_assets.artifacts.kinds import ADAPTERS, CHAMPIONS, STACKS
from finetune_assets.artifacts.records import NumberedRecords, now, record_fields
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import ArtifactMissing, StoreError
from finetune_assets.store.json_object import InvalidJson

PROMOTED, BY_HAND, ROLLED_BACK = "promoted", "promoted by hand", "rolled back"
FINGERPRINT = re.compile("[0-9a-f]{64}")
KINDS = (ADAPTERS.folder, STACKS.folder)
MAYBE = (str, type(None))
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("experiment", "adapter", "action", "kind", "reason", "by", "at"), str),
    **dict.fromkeys(("against", "evaluation", "before"), MAYBE),
    "numbers": dict,
    "number": int,
}
"""Types of a record's fields."""
REQUIRED = ("experiment", "adapter", "action", "number", "at")


class ChampionMoved(StoreError):
    """Another promotion came first; the decision was based on a champion that is no longer current."""

    retriable = True


@dataclass(frozen=True)
class Record:
    """One entry of an experiment's promotion history.

    Attributes:
        experiment: Name of the experiment.
        adapter: Fingerprint of the new champion.
        kind: Artifact kind of the adapter.
        action: `promoted`, `promoted by hand` or `rolled back`.
        against: Fingerprint of the champion that the adapter was compared with; None for the base model alone.
        evaluation: Fingerprint of the evaluation, if any.
        numbers: Metrics that the decision is based on.
        reason: Reason, as text.
        by: Run or user that promoted the adapter.
        at: Time (UTC, ISO 8601).
        number: Number of the record, from 1.
        before: Fingerprint of the previous champion.
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
    """Parse the record stored at `where`, a key that ends in the record's number.

    Raises:
        StoreError: if the record is invalid.
    """
    try:
        record = Record(**record_fields(content, where, TYPES, REQUIRED))
        for value in (record.adapter, record.against, record.evaluation, record.before):
            if value is not None and not FINGERPRINT.fullmatch(value):
                raise InvalidJson(f"'{value[:60]}' is not a fingerprint")
        if record.kind not in KINDS:
            raise InvalidJson(f"kind '{record.kind[:60]}' is not one of {', '.join(KINDS)}")
    except InvalidJson as e:
        raise StoreError(f"{where}: invalid champion record ({e}); delete it") from e
    return record


class Champions:
    """The champions of one experiment.

    Args:
        store: Store with the adapters and the records.
        experiment: Name of the experiment.
    """

    def __init__(self, store: ArtifactStore, experiment: str) -> None:
        self.store, self.experiment = store, experiment
        self.records = NumberedRecords(store, CHAMPIONS.folder, experiment, parse_record)

    def current(self) -> Record | None:
        """The record of the current champion, or None if no adapter was promoted yet."""
        return self.records.current()

    def history(self) -> list[Record]:
        """All records, oldest first."""
        return self.records.history()

    def champion(self) -> ArtifactRef | None:
        """The current champion, or None if no adapter was promoted yet.

        Raises:
            ArtifactMissing: if the adapter is no longer in the store.
        """
        current = self.current()
        return self.adapter(current) if current else None

    def adapter(self, record: Record) -> ArtifactRef:
        """The adapter that a record names.

        Raises:
            ArtifactMissing: if the adapter is no longer in the store.
        """
        ref = self.store.find(record.kind, record.adapter)
        if ref is None:
            raise ArtifactMissing(
                f"champion {record.number} of {self.experiment} is no longer in the store "
                f"({self.store.url}/{self.store.prefix(record.kind, record.adapter)}); roll back to another: "
                f"finetune adapter rollback {self.experiment} --to NUMBER"
            )
        return ref

    def withdrawn(self) -> dict[str, Record]:
        """Adapters that were rolled back and not promoted again, by fingerprint, with the record of the rollback."""
        rollbacks: dict[str, Record] = {}
        for record in self.history():
            if record.action == ROLLED_BACK and record.before:
                rollbacks[record.before] = record
            rollbacks.pop(record.adapter, None)
        return rollbacks

    def promote(self, record: Record, after: int) -> Record:
        """Append a record that was decided while record number `after` was the newest.

        Raises:
            ChampionMoved: if another record was appended since then.
        """
        before = self.records.read(after).adapter if after else None
        record = replace(record, experiment=self.experiment, number=after + 1, before=before, at=now())
        if not self.records.create(record.number, asdict(record)):
            raise ChampionMoved(
                f"{self.experiment}: another adapter was promoted in the meantime (record {record.number}); to compare "
                "with it, materialize adapter_evaluation and champion_adapter again"
            )
        return record

    def append(self, make: Callable[[Record | None], Record | None]) -> Record | None:
        """Append a record on behalf of a user; retries if other records are appended concurrently.

        Args:
            make: Returns the record that follows the newest record, or None if no record is needed.
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
        """Promote an adapter manually, without the gate.

        Returns:
            The new record, or None if the adapter is already the champion.

        Raises:
            StoreError: if the reason is blank.
        """
        _need_reason(reason)

        def make(current: Record | None) -> Record | None:
            if current and current.adapter == adapter.fingerprint:
                return None
            against = current.adapter if current else None
            return Record(self.experiment, adapter.fingerprint, BY_HAND, adapter.kind, against, reason=reason, by=by)

        return self.append(make)

    def roll_back(self, reason: str, by: str, to: int | None = None) -> Record:
        """Roll back to an earlier champion.

        Args:
            reason: Reason, recorded in the history.
            by: User that rolls back.
            to: Number of the record to return to; by default, the previous champion that was not rolled back.

        Raises:
            StoreError: if the reason is blank, or the record does not exist.
            ArtifactMissing: if the adapter is no longer in the store.
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
                raise StoreError(f"{self.experiment}: champion {current.number} is the first; no earlier one exists")
            if not earlier:
                raise StoreError(
                    f"{self.experiment}: all champions before {current.number} were rolled back; use --to NUMBER to "
                    "select any record of the history"
                )
            return earlier[-1]
        target = next((record for record in history if record.number == to), None)
        if target is None:
            raise StoreError(f"{self.experiment}: no record {to}; valid numbers: 1 to {len(history)}")
        if target.adapter == current.adapter:
            raise StoreError(f"{self.experiment}: the adapter of record {to} is already the champion")
        return target


def _need_reason(reason: str) -> None:
    if not reason.strip():
        raise StoreError("--reason is required; it is recorded in the promotion history")
