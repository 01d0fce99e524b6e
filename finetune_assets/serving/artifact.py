"""Servable copies of adapters in the store."""

from finetune_assets.artifacts.kinds import SERVABLE
from finetune_assets.artifacts.layout import CONFIG
from finetune_assets.config.loading import load_resolved
from finetune_assets.config.schema import Serving
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore


def servable_copy(store: ArtifactStore, adapter: ArtifactRef, serving: Serving) -> ArtifactRef:
    """Publish the servable copy of an adapter, or return the copy that the store has.

    Args:
        store: The store.
        adapter: The adapter, trained or combined.
        serving: Rank and name of the base model on the servers. Without a name, it is the adapter's `model.base_model`.

    Raises:
        NotServable: if servers do not support the adapter.
    """
    from finetune_assets.serving.copy import ADAPTER_CONFIG, padded_rank, read_settings, write_servable_copy

    folder = store.fetch(adapter, lambda path: path in (ADAPTER_CONFIG, CONFIG))
    rank = padded_rank(read_settings(folder / ADAPTER_CONFIG), serving.max_rank, adapter.uri)
    base_name = serving.base_name or load_resolved(folder / CONFIG).model.base_model
    name = SERVABLE.fingerprint(None, adapter=adapter.fingerprint, base_name=base_name, rank=rank)
    if copy := store.find(SERVABLE.folder, name):
        return copy
    manifest = store.manifest(adapter.kind, adapter.name)
    experiment = manifest.made_from.get("experiment") if manifest else None
    made_from = {"experiment": experiment, "adapter": adapter.fingerprint, "base_name": base_name, "rank": rank}
    with store.cache.exclusive(store.prefix(SERVABLE.folder, name), f"writing {SERVABLE.folder}/{name}"):
        if copy := store.find(SERVABLE.folder, name):
            return copy
        with store.cache.workspace("servable") as out:
            write_servable_copy(store.fetch(adapter), out, base_name, serving.max_rank)
            return store.publish(out, SERVABLE.folder, name, name, made_from)
