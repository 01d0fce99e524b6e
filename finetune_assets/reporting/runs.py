"""An adapter as the store tells of it: what it was made from, how it was trained, how it did."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_assets.artifacts.kinds import ADAPTERS, CHAMPIONS, EVALUATIONS, STACKS
from finetune_assets.artifacts.layout import EVALUATION, PROVENANCE, TRAINER_STATE
from finetune_assets.reporting.numbers import Numbers, of_evaluation, of_training
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory


@dataclass(frozen=True)
class Run:
    """One adapter.

    Attributes:
        experiment: Whose it is.
        fingerprint: Its own.
        created: When it was published (ISO 8601).
        combined: Whether it was combined from others instead of trained.
        overrides: Settings that its run alone had.
        made_from: What its manifest says of its origin.
        hardware: That it was trained on.
        numbers: What was measured, by name.
        steps: Where its training loss was reported; shape (n,).
        losses: Training loss there, in nats a token; shape (n,).
    """

    experiment: str
    fingerprint: str
    created: str
    combined: bool
    overrides: tuple[str, ...]
    made_from: Mapping[str, Any]
    hardware: str
    numbers: Numbers
    steps: tuple[int, ...]
    losses: tuple[float, ...]


def adapters(found: Inventory, namespace: str) -> list[Artifact]:
    """The adapters of a namespace, newest first."""
    return [
        one for one in found.artifacts if one.namespace == namespace and one.kind in (ADAPTERS.folder, STACKS.folder)
    ]


def evaluations(found: Inventory, namespace: str) -> dict[str, Artifact]:
    """The newest evaluation of each adapter, by the adapter's fingerprint."""
    ours = (one for one in found.artifacts if one.namespace == namespace and one.kind == EVALUATIONS.folder)
    newest: dict[str, Artifact] = {}
    for one in ours:
        newest.setdefault(str(one.manifest.made_from.get("lora_adapter")), one)
    return newest


def newest_records(found: Inventory, namespace: str) -> dict[str, str]:
    """The key of the newest record of a champion, by experiment."""
    newest: dict[str, str] = {}
    for key in found.records:
        first, kind, *rest = key.split("/")
        if (first, kind, len(rest)) == (namespace, CHAMPIONS.folder, 2):
            newest[rest[0]] = max(key, newest.get(rest[0], ""))
    return newest


def read_run(store: ArtifactStore, adapter: Artifact, evaluation: Artifact | None) -> Run:
    """Read what is known of an adapter; of its weights nothing.

    Raises:
        StoreError, OSError, ValueError, KeyError: if that cannot be read, or is not what was written there.
    """
    state, provenance = (json.loads(read(store, adapter, name)) for name in (TRAINER_STATE, PROVENANCE))
    measured = json.loads(read(store, evaluation, EVALUATION)) if evaluation else None
    history = state["history"]
    return Run(
        adapter.experiment,
        adapter.manifest.fingerprint,
        adapter.manifest.created,
        adapter.kind == STACKS.folder,
        tuple(adapter.manifest.made_from.get("overrides") or ()),
        adapter.manifest.made_from,
        provenance["hardware"],
        of_training(state) | (of_evaluation(measured) if measured else {}),
        tuple(entry["step"] for entry in history),
        tuple(entry["loss"] for entry in history),
    )


def read(store: ArtifactStore, artifact: Artifact, name: str) -> str:
    """One of an artifact's small files."""
    return store.read(artifact.kind, artifact.name, artifact.manifest, name).decode("utf-8")
