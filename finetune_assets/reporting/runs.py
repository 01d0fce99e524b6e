"""Read adapters from the store: provenance, training curves and measurements."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from finetune_assets.artifacts.kinds import ADAPTERS, STACKS
from finetune_assets.artifacts.layout import EVALUATION, PROVENANCE, TRAINER_STATE
from finetune_assets.artifacts.provenance import texts
from finetune_assets.plots.training import held_out
from finetune_assets.reporting.modes import mode_table
from finetune_assets.reporting.numbers import Numbers, of_evaluation, of_training
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory
from finetune_assets.store.json_object import MOST_FILE_BYTES, check_types, parse_object

T = TypeVar("T")
MOST_POINTS = 1000
"""Maximum number of points of a curve; a longer one is thinned out evenly."""
PREFERENCE_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("pairs", "labelled"), int),
    "beta": (int, float),
    "margins": dict,
}
"""Fields of `preferences` in `evaluation.json` that are shown."""


@dataclass(frozen=True)
class Run:
    """One adapter.

    Attributes:
        experiment: Name of the experiment.
        fingerprint: Fingerprint of the adapter.
        created: Time of publication (ISO 8601).
        combined: Whether the adapter was combined from others instead of trained.
        overrides: Settings overridden for this run.
        made_from: Inputs of the adapter, from its manifest.
        hardware: Hardware that it was trained on.
        numbers: Measurements by name.
        steps: Steps at which the training loss was reported; shape (n,).
        losses: Training loss at these steps, in nats per token; shape (n,).
        held_out: Step and held-out loss where it was measured; shape (m, 2).
        evaluation: Fingerprint of the evaluation; empty if the run is not evaluated.
        wandb_url: Page of the run in Weights & Biases; empty without one.
        modes: Measurements in each mode, with retrieval: `modes` of `evaluation.json`.
        unseen_passages: The same of the rows with unseen passages.
        preferences: Held-out judgements and their reward margins: `preferences` of `evaluation.json`.
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
    held_out: tuple[tuple[int, float], ...] = ()
    evaluation: str = ""
    wandb_url: str = ""
    modes: Mapping[str, Any] = field(default_factory=dict)
    unseen_passages: Mapping[str, Any] = field(default_factory=dict)
    preferences: Mapping[str, Any] = field(default_factory=dict)


def adapters(inventory: Inventory, namespace: str) -> list[Artifact]:
    """Return the adapters of a namespace, newest first."""
    return [
        artifact
        for artifact in inventory.artifacts
        if artifact.namespace == namespace and artifact.kind in (ADAPTERS.folder, STACKS.folder)
    ]


def read_run(store: ArtifactStore, adapter: Artifact, evaluation: Artifact | None) -> Run:
    """Read the metadata and measurements of an adapter, without its weights.

    Raises:
        StoreError, OSError, ValueError, KeyError: if the files cannot be read, or have been changed.
    """
    state, provenance = (read_object(store, adapter, name) for name in (TRAINER_STATE, PROVENANCE))
    measured = read_object(store, evaluation, EVALUATION) if evaluation else {}
    # What the pages show: an invalid part is an error of this run alone
    of_modes = {name: measured.get(name, {}) for name in ("modes", "unseen_passages")}
    for modes in of_modes.values():
        mode_table(modes)
    if preferences := measured.get("preferences", {}):
        check_types(preferences, PREFERENCE_TYPES)
    history = thinned(state["history"])
    return Run(
        adapter.experiment,
        adapter.manifest.fingerprint,
        adapter.manifest.created,
        adapter.kind == STACKS.folder,
        tuple(texts(adapter.manifest.made_from, "overrides")),
        adapter.manifest.made_from,
        provenance["hardware"],
        of_training(state) | (of_evaluation(measured) if measured else {}),
        tuple(entry["step"] for entry in history),
        tuple(entry["loss"] for entry in history),
        tuple(thinned(held_out(state))) if history else (),
        evaluation.manifest.fingerprint if evaluation else "",
        _web_address(state.get("wandb")),
        **of_modes,
        preferences=preferences,
    )


def thinned(points: list[T]) -> list[T]:
    """At most `MOST_POINTS` of the points, evenly, and the last one."""
    every = -(-len(points) // MOST_POINTS) or 1
    return points[:-1][::every] + points[-1:]


def _web_address(link: Any) -> str:
    url = link.get("url") if isinstance(link, dict) else None
    return url if isinstance(url, str) and url.startswith(("https://", "http://")) else ""


def read_object(store: ArtifactStore, artifact: Artifact, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of an artifact."""
    return parse_object(store.read(artifact.kind, artifact.name, artifact.manifest, name), MOST_FILE_BYTES)


def read(store: ArtifactStore, artifact: Artifact, name: str) -> str:
    """Read a small text file of an artifact."""
    return store.read(artifact.kind, artifact.name, artifact.manifest, name).decode("utf-8")
