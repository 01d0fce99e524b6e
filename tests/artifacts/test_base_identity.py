"""The base model of an adapter for a warm start: another one is refused, an unknown one is logged."""

import json
import logging
from pathlib import Path

import pytest
from projects import TestProject

from finetune_assets.artifacts.base_identity import RecordedBase, check_warm_start
from finetune_assets.artifacts.kinds import ADAPTERS, BASE_MODELS
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.errors import StoreError

ADAPTER = "a" * 64


def publish_base(project: TestProject, name: str, fingerprint: str, weights: str) -> ArtifactRef:
    folder = project.root / "bases" / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(weights)
    (folder / "README.md").write_text(name)
    return project.store.publish(folder, BASE_MODELS.folder, name, fingerprint, {})


@pytest.fixture
def ours(project: TestProject) -> ArtifactRef:
    return publish_base(project, "owner/model/rev1", "1" * 64, "weights")


def check(ours: ArtifactRef, warm_start: str) -> None:
    check_warm_start(Project(overrides=[f"training.warm_start={warm_start}"]).lineage("demo"), ours)


def publish_adapter(project: TestProject, **made_from: str) -> None:
    folder = project.root / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    project.store.publish(folder, ADAPTERS.folder, ADAPTER, ADAPTER, made_from)


def test_an_adapter_of_the_same_base(project: TestProject, ours: ArtifactRef, caplog: pytest.LogCaptureFixture) -> None:
    publish_adapter(project, cached_base_model=ours.fingerprint, base_model="owner/model", revision="rev1")
    with caplog.at_level(logging.WARNING):
        check(ours, ADAPTER)
    assert not caplog.records


def test_an_adapter_of_another_base_is_refused(project: TestProject, ours: ArtifactRef) -> None:
    publish_adapter(project, cached_base_model="2" * 64, base_model="owner/other", revision="rev9")
    with pytest.raises(StoreError, match=r"training\.warm_start: .*owner/other \(rev9\).*owner/model/rev1"):
        check(ours, ADAPTER)


@pytest.mark.parametrize(("weights", "same"), [("weights", True), ("other", False)])
def test_another_name_of_the_same_weights(project: TestProject, ours: ArtifactRef, weights: str, same: bool) -> None:
    other = publish_base(project, "local/copy/rev2", "2" * 64, weights)
    recorded = RecordedBase(other.fingerprint, "local/copy", "rev2")
    assert recorded.is_base(project.store, ours) is same
    assert RecordedBase("3" * 64, "local/gone", "rev2").is_base(project.store, ours) is False


@pytest.mark.parametrize(
    ("config", "provenance", "expected"),
    [
        ({"base_model_name_or_path": "owner/model"}, None, True),
        ({"base_model_name_or_path": "Owner/Model", "revision": "rev1"}, None, True),
        ({"base_model_name_or_path": "owner/model", "revision": "rev7"}, None, None),
        ({"base_model_name_or_path": "owner/other"}, None, False),
        ({"base_model_name_or_path": "/models/llama"}, None, None),
        ({"base_model_name_or_path": "./owner/model"}, None, None),
        ({"base_model_name_or_path": "packaged/demo-base"}, None, None),
        ({"base_model_name_or_path": None}, None, None),
        ({"base_model_name_or_path": 5, "revision": 5}, None, None),
        ([], None, None),
        ({"base_model_name_or_path": "owner/model"}, {"cached_base_model": "2" * 64}, False),
        ({"base_model_name_or_path": "owner/other"}, {"cached_base_model": "1" * 64}, True),
        ({"base_model_name_or_path": "owner/model"}, {"cached_base_model": None}, True),
        ({"base_model_name_or_path": "owner/model"}, "no object", True),
    ],
)
def test_a_folders_base(
    project: TestProject,
    ours: ArtifactRef,
    caplog: pytest.LogCaptureFixture,
    config: object,
    provenance: object,
    expected: bool | None,
) -> None:
    folder = project.root / "mine"
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if provenance is not None:
        (folder / "provenance.json").write_text(json.dumps(provenance))
    assert RecordedBase.in_folder(folder).is_base(project.store, ours) is expected
    if expected is False:
        with pytest.raises(StoreError, match=r"training\.warm_start"):
            check(ours, str(folder))
        return
    with caplog.at_level(logging.WARNING):
        check(ours, str(folder))
    assert bool(caplog.records) is (expected is None)


def test_no_warm_start_needs_no_record(ours: ArtifactRef, project: TestProject) -> None:
    check_warm_start(Project().lineage("demo"), ours)
    with pytest.raises(StoreError, match="gone"):
        check(ours, str(Path("./gone")))
