"""Evaluations in the store, by the adapter that they measured."""

from finetune_assets.artifacts.kinds import EVALUATIONS
from finetune_assets.store.gc import Artifact, Inventory


def newest_evaluations(inventory: Inventory, namespace: str) -> dict[str, Artifact]:
    """Return the newest evaluation of each adapter, by fingerprint of the adapter."""
    artifacts = (
        artifact
        for artifact in inventory.artifacts
        if artifact.namespace == namespace and artifact.kind == EVALUATIONS.folder
    )
    oldest_first = sorted(artifacts, key=lambda artifact: artifact.created)
    return {str(artifact.manifest.made_from.get("lora_adapter")): artifact for artifact in oldest_first}
