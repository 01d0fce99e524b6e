"""Servable copies in the store."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from projects import TestProject
from serving.test_copy import LEARNS_FAST, RANKS
from trainings import Train

from finetune_assets.artifacts.kinds import ADAPTERS, RETENTION, SERVABLE
from finetune_assets.config.schema import Serving, StoreConfig
from finetune_assets.serving import copy
from finetune_assets.serving.artifact import servable_copy
from finetune_assets.serving.copy import NotServable
from finetune_assets.store import gc
from finetune_assets.store.artifacts import ArtifactRef

SERVING = Serving(["folder:./served"])
FINGERPRINT = "f" * 64


@pytest.fixture
def adapter(trained: Train, project: TestProject) -> ArtifactRef:
    output = trained(LEARNS_FAST, "lora.rank=6", RANKS).job.output
    made_from = {"fingerprint": FINGERPRINT, "experiment": "demo"}
    return project.store.publish(output, ADAPTERS.folder, FINGERPRINT, FINGERPRINT, made_from)


def config_of(project: TestProject, ref: ArtifactRef) -> dict[str, object]:
    text = (project.store.fetch(ref) / "adapter_config.json").read_text()
    return dict(json.loads(text))


def test_a_copy_is_published_once(project: TestProject, adapter: ArtifactRef, monkeypatch: pytest.MonkeyPatch) -> None:
    first = servable_copy(project.store, adapter, SERVING)
    assert first.kind == SERVABLE.folder
    config = config_of(project, first)
    assert (config["r"], config["base_model_name_or_path"]) == (16, "demo-base")
    manifest = project.store.manifest(first.kind, first.name)
    assert manifest
    assert manifest.made_from == {"experiment": "demo", "adapter": FINGERPRINT, "base_name": "demo-base", "rank": 16}
    monkeypatch.setattr(copy, "write_servable_copy", lambda *args: pytest.fail("written twice"))
    assert servable_copy(project.store, adapter, SERVING) == first
    assert servable_copy(project.store, adapter, replace(SERVING, max_rank=128)) == first, "the rank is the same"
    assert project.published(SERVABLE.folder) == [first.name]


def test_each_name_of_the_base_model_has_a_copy(project: TestProject, adapter: ArtifactRef) -> None:
    names = {servable_copy(project.store, adapter, replace(SERVING, base_name=name)).name for name in ("a", "b", "a")}
    assert len(names) == 2


def test_rank_above_the_limit_publishes_nothing(project: TestProject, adapter: ArtifactRef) -> None:
    with pytest.raises(NotServable, match=r"rank_pattern\.layers.0.mlp.up_proj 12.*serving.max_rank 8"):
        servable_copy(project.store, adapter, replace(SERVING, max_rank=8))
    assert project.published(SERVABLE.folder) == []


def test_failed_copy_publishes_nothing_and_leaves_no_files(
    project: TestProject, adapter: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(adapter: Path, out: Path, *rest: object) -> None:
        (out / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copy, "write_servable_copy", full)
    with pytest.raises(OSError, match="No space left"):
        servable_copy(project.store, adapter, SERVING)
    assert project.published(SERVABLE.folder) == []
    assert not [*project.store.cache.root.glob("work/*")]


def test_fingerprint_is_of_adapter_name_and_rank() -> None:
    inputs = {"adapter": FINGERPRINT, "base_name": "demo-base", "rank": 16}
    changes = [{"adapter": "e" * 64}, {"base_name": "other"}, {"rank": 32}]
    assert len({SERVABLE.fingerprint(None, **{**inputs, **change}) for change in ({}, *changes)}) == 4


def test_a_copy_is_kept_with_its_adapter(project: TestProject, adapter: ArtifactRef) -> None:
    servable_copy(project.store, adapter, SERVING)

    def removed(retention: dict[str, gc.Retention]) -> set[str]:
        contents = gc.inventory(project.store.objects)
        planned = gc.plan(contents, project.store.namespace, StoreConfig(keep_days=0), retention)
        return {removal.prefix.split("/")[1] for removal in planned}

    assert removed(RETENTION) == set()
    assert removed({**RETENTION, ADAPTERS.folder: gc.Retention()}) == {ADAPTERS.folder, SERVABLE.folder}
