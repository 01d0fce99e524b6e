"""What the servers of an experiment answer with: numbered records, of which the highest number is current.

A record is the alias. A rollback is a new record that names an adapter that is still loaded.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from finetune_assets.artifacts.champions import FINGERPRINT, KINDS, MAYBE, ChampionMoved
from finetune_assets.artifacts.kinds import SERVED
from finetune_assets.artifacts.records import NumberedRecords, now, record_fields
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.errors import StoreError
from finetune_assets.store.json_object import InvalidJson

logger = logging.getLogger(__name__)
SERVES, ROLLED_BACK = "serves", "rolled back"
NAME = re.compile(r"(?P<experiment>[A-Za-z0-9][A-Za-z0-9._-]*)-(?P<record>[1-9]\d{0,7})-(?P<copy>[0-9a-f]{8})")
"""Name of an adapter on the servers: experiment, number of the champion record, and fingerprint of the copy."""
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("experiment", "name", "adapter", "kind", "copy", "action", "by", "at"), str),
    **dict.fromkeys(("champion", "number"), int),
    **dict.fromkeys(("numbers", "probe"), dict),
    "previous": MAYBE,
    "servers": list,
}
REQUIRED = ("experiment", "name", "adapter", "kind", "copy", "action", "champion", "number", "at")


@dataclass(frozen=True)
class Served:
    """One entry of the history of what an experiment's servers answer with.

    Attributes:
        experiment: Name of the experiment.
        name: Name of the adapter on the servers; it never gets other bytes.
        adapter: Fingerprint of the adapter.
        kind: Artifact kind of the adapter.
        copy: Fingerprint of the servable copy.
        champion: Number of the champion record that this follows.
        action: `serves` or `rolled back`.
        previous: Name of the adapter before, which stays loaded for a rollback.
        servers: Servers on which the adapter was verified, without credentials.
        numbers: Numbers of the verification.
        probe: One gate row with which a server is asked which adapter answers; see `verify.Probe`.
        by: Run or user.
        at: Time (UTC, ISO 8601).
        number: Number of the record, from 1.
    """

    experiment: str
    name: str
    adapter: str
    kind: str
    copy: str
    champion: int
    action: str = SERVES
    previous: str | None = None
    servers: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    by: str = ""
    at: str = ""
    number: int = 0


def served_name(experiment: str, champion: int, copy: str) -> str:
    """Name of an adapter on the servers."""
    return f"{experiment}-{champion}-{copy[:8]}"


def parse_served(content: bytes, where: str) -> Served:
    """Parse the record stored at `where`.

    Raises:
        StoreError: if the record is invalid.
    """
    try:
        record = Served(**record_fields(content, where, TYPES, REQUIRED))
        for value in (record.adapter, record.copy):
            if not FINGERPRINT.fullmatch(value):
                raise InvalidJson(f"'{value[:60]}' is not a fingerprint")
        for name in (record.name, record.previous):
            if name is not None and not NAME.fullmatch(name):
                raise InvalidJson(f"'{name[:60]}' is not the name of a served adapter")
        if record.kind not in KINDS:
            raise InvalidJson(f"kind '{record.kind[:60]}' is not one of {', '.join(KINDS)}")
    except InvalidJson as e:
        raise StoreError(f"{where}: invalid record of a served adapter ({e}); delete it") from e
    return record


def served_by_name(store: ArtifactStore, names: Iterable[str]) -> dict[str, "Served"]:
    """Find the records of served adapters by their names; a name without a record in this store is left out."""
    wanted = {name: match["experiment"] for name in names if (match := NAME.fullmatch(name))}
    found: dict[str, Served] = {}
    for experiment in sorted({*wanted.values()}):
        try:
            history = ServedRecords(store, experiment).history()
        except StoreError as e:
            logger.warning("Cannot look up the served adapters of %s: %s", experiment, e)
            continue
        found |= {record.name: record for record in history if record.name in wanted}
    return found


class ServedRecords:
    """The history of what the servers of one experiment answer with.

    Args:
        store: Store of the records.
        experiment: Name of the experiment.
    """

    def __init__(self, store: ArtifactStore, experiment: str) -> None:
        self.experiment = experiment
        self.records = NumberedRecords(store, SERVED.folder, experiment, parse_served)

    def current(self) -> Served | None:
        """What serves, or None if nothing was served yet."""
        return self.records.current()

    def history(self) -> list[Served]:
        """All records, oldest first."""
        return self.records.history()

    def append(self, record: Served, after: int) -> Served:
        """Append a record that was decided while record number `after` was the newest.

        Raises:
            ChampionMoved: if another record was appended since then.
        """
        record = replace(record, number=after + 1, at=now())
        if not self.records.create(record.number, asdict(record)):
            raise ChampionMoved(
                f"{self.experiment}: another run changed what is served (record {record.number}); materialize "
                "served_adapter again"
            )
        return record
