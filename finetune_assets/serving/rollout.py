"""Serves a champion: load it on every server under a name of its own, verify its answers, move the alias, unload.

The alias moves only after every server has answered with the new adapter. Until then, and if one does not, the adapter
before serves on, and the new one is unloaded.
"""

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_assets.artifacts.champions import Record
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.serving.artifact import servable_copy
from finetune_assets.serving.errors import LEAK, OTHER_BASE, ServerError
from finetune_assets.serving.gate_rows import GateRows, gate_rows
from finetune_assets.serving.servers import Server, Servers
from finetune_assets.serving.state import Served, ServedRecords, served_name
from finetune_assets.serving.verify import Verdict, Verification
from finetune_assets.serving.vllm import Model, VllmServer
from finetune_assets.store.artifacts import ArtifactRef

DRAIN_SECONDS, POLL_SECONDS = 60.0, 0.5
"""Time to wait for running requests before an adapter is unloaded, and the interval of looking."""
LONGEST = 1 << 20
"""Maximum number of tokens of a row for servers that list no limit."""
Log = Callable[[str], None]


@dataclass
class Rollout:
    """The result of serving a champion.

    Attributes:
        name: Name of the adapter on the servers.
        serves: What serves afterwards; None if nothing does.
        moved: Whether the alias was moved.
        verdicts: What each vLLM server answered with, by server.
        notes: Adapters that could not be unloaded, and why.
    """

    name: str
    serves: Served | None = None
    moved: bool = False
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts.values())


class Serving:
    """Serves the champion of one experiment.

    Args:
        lineage: Lineage of the experiment.
        servers: Its servers.
        log: Called with each log line.
        by: Run or user, for the record.
    """

    def __init__(self, lineage: Lineage, servers: Servers, log: Log, by: str) -> None:
        self.lineage, self.servers, self.log, self.by = lineage, servers, log, by
        self.records = ServedRecords(lineage.store, lineage.experiment.name)

    def serve(self, champion: Record) -> Rollout:
        """Serve a champion, or verify it again if it serves already.

        Raises:
            StoreError: if the store lacks the champion or its evaluation.
            UserError: if a folder has other files under the adapter's name.
        """
        history = self.records.history()
        current = history[-1] if history else None
        self._adapters = {record.name: record.adapter for record in history}
        adapter = self.lineage.champions.adapter(champion)
        copy = servable_copy(self.lineage.store, adapter, self.servers.settings)
        known = [record for record in history if record.copy == copy.fingerprint]
        name = known[-1].name if known else served_name(self.lineage.experiment.name, champion.number, copy.fingerprint)
        rollout = Rollout(name, current)
        is_current = current is not None and current.name == name
        before = current.previous if is_current and current else current.name if current else None
        folder = self._publish(name, copy)
        for replica in self.servers.replicas:
            verdict = self._load_and_verify(replica, name, folder, champion, adapter, before)
            rollout.verdicts[replica.shown] = verdict
            self.log(verdict.reason)
            if not verdict.passed:
                self._withdraw(rollout, is_current)
                return rollout
        if not is_current:
            record = self._record(name, copy, champion, adapter, before, rollout)
            rollout.serves, rollout.moved = self.records.append(record, current.number if current else 0), True
            self.log(f"{name} serves {self.lineage.experiment.name} (record {rollout.serves.number})")
        assert rollout.serves
        for place in self.servers.folders:
            place.write_alias(rollout.serves)
        self._keep_previous(rollout)
        self._retire(rollout, {record.name for record in history})
        return rollout

    def _publish(self, name: str, copy: ArtifactRef) -> Path:
        """Copy the files into each folder; returns the one that replicas load from."""
        files = self.lineage.store.fetch(copy)
        for folder in self.servers.folders:
            folder.load(name, files)
        return self.servers.folders[0].at(name)

    def _load_and_verify(
        self,
        replica: VllmServer,
        name: str,
        folder: Path,
        champion: Record,
        adapter: ArtifactRef,
        before: str | None,
    ) -> Verdict:
        """Load an adapter on one server and verify its answers; an error of the server is a verdict as well."""
        base_name = str(self.servers.settings.base_name)
        try:
            listed = replica.models()
            if base_name not in listed:
                names = ", ".join(sorted(name for name, model in listed.items() if model.parent is None))
                raise ServerError(
                    f"{replica.shown} has no base model '{base_name}', only {names}; set serving.base_name, or start "
                    f"the server with --served-model-name {base_name}",
                    OTHER_BASE,
                )
            began = time.monotonic()
            if name not in listed:
                check_unload(replica, name, folder)
                replica.load(name, folder)
            loaded = time.monotonic()
            rows = self._rows(listed[base_name], champion, adapter)
            others = [
                other for other, model in listed.items() if other not in (name, before, base_name) and model.parent
            ]
            previous = before if before in listed else None
            was_evaluated = rows.champion == self._adapters.get(before or "")
            verdict = Verification(replica, name, rows, base_name, previous, was_evaluated, others).run()
            verdict.numbers.update(load_s=loaded - began, verify_s=time.monotonic() - loaded)
            return verdict
        except ServerError as e:
            return Verdict(False, e.diagnosis, f"{name}: {e.diagnosis}: {e}")

    def _rows(self, base: Model, champion: Record, adapter: ArtifactRef) -> GateRows:
        longest = LONGEST if base.max_length is None else base.max_length
        return gate_rows(self.lineage, adapter, champion.evaluation, self.servers.settings.verify_rows, longest)

    def _record(
        self,
        name: str,
        copy: ArtifactRef,
        champion: Record,
        adapter: ArtifactRef,
        before: str | None,
        rollout: Rollout,
    ) -> Served:
        verdicts = [*rollout.verdicts.values()]
        return Served(
            experiment=self.lineage.experiment.name,
            name=name,
            adapter=adapter.fingerprint,
            kind=adapter.kind,
            copy=copy.fingerprint,
            champion=champion.number,
            previous=before,
            servers=self.servers.shown,
            numbers={replica: verdict.numbers for replica, verdict in rollout.verdicts.items()},
            probe=verdicts[0].probe if verdicts else {},
            by=self.by,
        )

    def _withdraw(self, rollout: Rollout, is_current: bool) -> None:
        """Unload an adapter that was not verified, unless it serves: then nothing else would."""
        if is_current:
            return
        for server in self.servers.every:
            self._unload(rollout, server, rollout.name)

    def _keep_previous(self, rollout: Rollout) -> None:
        """Load the adapter before where a server lost it, so that a rollback needs no loading."""
        assert rollout.serves
        previous, folder = rollout.serves.previous, self.servers.folders[0]
        if previous is None or previous not in folder.names():
            return
        for replica in self.servers.replicas:
            try:
                if previous not in replica.names():
                    replica.load(previous, folder.at(previous))
                    self.log(f"{replica.shown}: loaded {previous} again, for a rollback")
            except ServerError as e:
                rollout.notes.append(f"{previous} is not loaded for a rollback: {e}")

    def _retire(self, rollout: Rollout, earlier: Iterable[str]) -> None:
        """Unload the experiment's adapters other than what serves and the one before."""
        assert rollout.serves
        retired = sorted({*earlier} - {rollout.serves.name, rollout.serves.previous})
        in_use = set()
        for replica in self.servers.replicas:
            try:
                listed = replica.names()
            except ServerError as e:
                rollout.notes.append(str(e))
                in_use |= {*retired}
                continue
            for name in retired:
                if name in listed and not (drained(replica, name) and self._unload(rollout, replica, name)):
                    in_use.add(name)
        for name in in_use:
            rollout.notes.append(f"{name} stays loaded; the next rollout unloads it")
        for folder in self.servers.folders:
            for name in retired:
                if name not in in_use:
                    folder.unload(name)

    def _unload(self, rollout: Rollout, server: Server, name: str) -> bool:
        """Unload an adapter; an error becomes a note, because what serves is not affected."""
        try:
            server.unload(name)
        except ServerError as e:
            rollout.notes.append(f"{name} was not unloaded: {e}")
            return False
        self.log(f"{server.shown}: unloaded {name}")
        return True


def drained(replica: VllmServer, name: str) -> bool:
    """Wait until no request of an adapter runs; False if some still do after `DRAIN_SECONDS`.

    A server without this metric is not waited for.
    """
    end = time.monotonic() + DRAIN_SECONDS
    while name in (replica.busy() or ()):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def check_unload(replica: VllmServer, name: str, folder: Path) -> None:
    """Load and unload an adapter under a name for this purpose, before users depend on it.

    Raises:
        ServerError: with the diagnosis `unload leaks`, if the server still answers to the name.
    """
    probe = f"{name}-unload-check-{uuid.uuid4().hex[:8]}"
    replica.load(probe, folder)
    replica.unload(probe)
    if probe in replica.names() or replica.answers_to(probe):
        raise ServerError(
            f"{replica.shown} still answers to {probe} after it was unloaded, so memory fills up and old adapters "
            "keep answering; restart the server, or update it",
            LEAK,
        )


def numbers_of(rollout: Rollout) -> dict[str, Any]:
    """Values of the first server that failed, or of the last one."""
    verdicts = [*rollout.verdicts.values()]
    failed = [verdict for verdict in verdicts if not verdict.passed]
    return (failed or verdicts)[-1].numbers if verdicts else {}
