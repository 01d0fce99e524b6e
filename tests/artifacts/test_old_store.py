"""A store that an earlier version wrote is this version's store too: nothing in it is made again.

`old_store/` was written by commit 9caaf9a, before the registry of kinds: a Llama of two layers, 240 rows, one champion.
"""

import shutil
from pathlib import Path

import pytest
from integration.graph import Graph

from finetune_assets.artifacts.champions import Champions
from finetune_assets.artifacts.kinds import KINDS
from finetune_assets.store.artifacts import open_store
from finetune_assets.store.gc import inventory

OLD = Path(__file__).with_name("old_store")
ASSETS = {"dolly_raw", "cached_base_model", "tokenized_dataset", "training_plan", "lora_adapter", "adapter_evaluation"}
ASSETS |= {"champion_adapter", "merged_model"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with that store."""
    folder = Path(shutil.copytree(OLD, tmp_path / "project"))
    settings = {"CONFIGS": folder / "configs", "STORE": f"file://{folder}/store", "CACHE": folder / "cache"}
    for name, value in {**settings, "NAMESPACE": "tests"}.items():
        monkeypatch.setenv(f"FINETUNE_{name}", str(value))
    return folder


def test_every_artifact_is_found_and_none_is_made_again(root: Path) -> None:
    store = open_store(f"file://{root}/store", "tests", root / "cache")
    before, champions = inventory(store.objects), Champions(store, "nano")
    history = champions.history()
    assert len(history) == 1
    run = Graph().run([*ASSETS], "nano")
    assert run.success, run.log
    newer = {"dolly_raw", "tokenized_dataset", "merged_model"}
    assert run.reused == ASSETS - newer, "the code of the first two makes the same; a merged model has a chat template"
    after = inventory(store.objects)
    old = {one.prefix: one.manifest for one in before.artifacts}
    new = {one.prefix: one.manifest for one in after.artifacts}
    assert {prefix: new[prefix] for prefix in old} == old
    added = [manifest for prefix, manifest in new.items() if prefix not in old]
    assert sorted(manifest.kind for manifest in added) == ["merged", "raw", "tokenized"]
    same = [manifest for manifest in added if manifest.kind != "merged"]
    assert all(manifest.made_from["same_as"] in {one.fingerprint for one in old.values()} for manifest in same)
    assert champions.history() == history
    assert Graph().run([*ASSETS], "nano").reused == ASSETS


def test_every_artifact_of_it_is_of_a_known_kind_and_whole(root: Path) -> None:
    store = open_store(f"file://{root}/store", "tests", root / "cache")
    artifacts = inventory(store.objects).artifacts
    assert {one.kind for one in artifacts} <= {kind.folder for kind in KINDS}
    assert all(store.verify(one.kind, one.name) == [] for one in artifacts)
