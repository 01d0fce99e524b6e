"""Evaluations in the store, by the adapter that they measured."""

from finetune_assets.artifacts.kinds import EVALUATIONS
from finetune_assets.store.gc import Artifact, Inventory


def newest_evaluations(inventory: Inventory, namespace: str) -> dict[str, Artifact]:
    """Return the newest evaluation of each adapter, by fingerprint of the adapter."""
    return {
        str(artifact.manifest.made_from.get("lora_adapter")): artifact
        for artifact in reversed(inventory.artifacts)  # the newest is last and replaces the others
        if artifact.namespace == namespace and artifact.kind == EVALUATIONS.folder
    }
