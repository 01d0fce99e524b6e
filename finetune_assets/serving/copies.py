"""Copies of adapters as servers load them."""

import json
import shutil

from finetune_assets.artifacts.kinds import SERVABLE
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.config.schema import Serving
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.json_object import read_json

CONFIG = "adapter_config.json"
FILES = (CONFIG, "adapter_model.safetensors")
PREFIXES = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges", "added_tokens")
"""Beginnings of the names of the tokenizer's files and of the chat template."""


def servable_copy(store: ArtifactStore, adapter: ArtifactRef, serving: Serving) -> ArtifactRef:
    """The servable copy of an adapter, published if the store does not have it.

    Args:
        store: Store of the adapter.
        adapter: The adapter.
        serving: Settings, with the name of the base model.
    """
    name = fingerprint(adapter=adapter.fingerprint, base_name=serving.base_name, max_rank=serving.max_rank)
    if found := store.find(SERVABLE.folder, name):
        return found
    source = store.fetch(adapter)
    with store.cache.workspace("servable") as folder:
        for path in source.iterdir():
            if path.name in FILES or path.name.startswith(PREFIXES):
                shutil.copyfile(path, folder / path.name)
        settings = read_json(folder / CONFIG, f"{adapter.kind}/{adapter.name}")
        settings["base_model_name_or_path"] = serving.base_name
        (folder / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        made_from = {"adapter": adapter.fingerprint, "base_name": serving.base_name, "max_rank": serving.max_rank}
        return store.publish(folder, SERVABLE.folder, name, name, made_from)
