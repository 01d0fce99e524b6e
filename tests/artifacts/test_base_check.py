"""Base models are shared by all namespaces: what somebody else wrote under a model's name is not used."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from projects import TestProject
from servers.hub import Hub

from finetune_assets.artifacts.base_check import find_base_model
from finetune_assets.artifacts.imports import Import, import_external
from finetune_assets.sources.base_models import PACKAGED, BaseModelError, collect, folder_revision, locate
from finetune_assets.sources.pins import Pins
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore, open_store
from finetune_assets.store.errors import ForeignContent
from finetune_assets.store.hashing import folder_hashes, sha256

KIND = "base-models"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(f"file://{tmp_path}/store", "alice", tmp_path / "cache")


@pytest.fixture
def mallory(tmp_path: Path) -> ArtifactStore:
    return open_store(f"file://{tmp_path}/store", "mallory", tmp_path / "cache-of-mallory")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The packaged model, with code of its own."""
    folder = Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "model"))
    (folder / "modeling.py").write_text("print('reviewed')")
    return folder


def changed(model: Path, tmp_path: Path, name: str, content: str | None) -> Path:
    folder = Path(shutil.copytree(model, tmp_path / "changed"))
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    return folder


CHANGES = [
    ("modeling.py", "import os"),
    ("config.json", "{}"),
    ("tokenizer_config.json", None),
    ("extra.py", "import os"),
    ("model.safetensors", "other weights"),
]


@pytest.mark.parametrize(("name", "content"), CHANGES)
def test_a_folders_model_of_somebody_else_is_refused(
    store: ArtifactStore, mallory: ArtifactStore, model: Path, tmp_path: Path, name: str, content: str | None
) -> None:
    revision = folder_revision(folder_hashes(model))
    mallory.publish(changed(model, tmp_path, name, content), KIND, f"local/model/{revision}", "f" * 64, {})
    with pytest.raises(ForeignContent, match=rf"local/model/{revision}.*force"):
        find_base_model(Pins(store, "model", "cached_base_model"), f"local/model/{revision}")
    with pytest.raises(ForeignContent, match=name.replace(".", r"\.")):
        store.publish(model, KIND, f"local/model/{revision}", "f" * 64, {}, expected=folder_hashes(model))
    ref = store.publish(
        model, KIND, f"local/model/{revision}", "f" * 64, {}, replace=True, expected=folder_hashes(model)
    )
    assert find_base_model(Pins(store, "model", "cached_base_model"), f"local/model/{revision}") == ref


@pytest.fixture
def commit(hub: Hub, model: Path) -> str:
    return hub.add("owner/model", {path.name: path.read_bytes() for path in model.iterdir()})


def pins(store: ArtifactStore) -> Pins:
    return Pins(store, "model", "cached_base_model")


@pytest.mark.parametrize(("name", "content"), CHANGES)
def test_a_commits_model_of_somebody_else_is_refused(
    store: ArtifactStore,
    mallory: ArtifactStore,
    model: Path,
    commit: str,
    tmp_path: Path,
    name: str,
    content: str | None,
) -> None:
    mallory.publish(changed(model, tmp_path, name, content), KIND, f"owner/model/{commit}", "f" * 64, {})
    with pytest.raises(ForeignContent, match=rf"owner/model/{commit}.*{name}.*force"):
        find_base_model(pins(store), f"owner/model/{commit}")
    assert pins(store).hashes("owner/model", commit) is None, "nothing was recorded"


def test_a_commits_hashes_are_recorded_so_that_the_hub_is_asked_once(
    store: ArtifactStore, mallory: ArtifactStore, model: Path, commit: str, hub: Hub, tmp_path: Path
) -> None:
    ref = mallory.publish(model, KIND, f"owner/model/{commit}", "f" * 64, {})
    hub.requests.clear()
    assert find_base_model(pins(store), f"owner/model/{commit}") == ref, "the same files, whoever wrote them"
    assert [request for request in hub.requests if "/tree/" not in request] == []
    assert len(hub.requests) == 1
    assert pins(store).hashes("owner/model", commit) == folder_hashes(model)
    hub.requests.clear()
    hub.failing = 403
    assert find_base_model(pins(store), f"owner/model/{commit}", f"owner/model@{commit}") == ref
    assert hub.requests == []
    folder = changed(model, tmp_path, "modeling.py", "import os")
    mallory.publish(folder, KIND, f"owner/model/{commit}", "f" * 64, {}, replace=True)
    with pytest.raises(ForeignContent, match=r"modeling\.py"):
        find_base_model(pins(store), f"owner/model/{commit}")


def test_where_the_hub_was_never_reached_code_is_not_trusted(
    store: ArtifactStore,
    mallory: ArtifactStore,
    model: Path,
    commit: str,
    hub: Hub,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ref = mallory.publish(model, KIND, f"owner/model/{commit}", "f" * 64, {})
    hub.failing = 403
    with caplog.at_level(logging.WARNING, "finetune_assets"):
        assert find_base_model(pins(store), f"owner/model/{commit}") == ref
    assert commit in caplog.text
    with pytest.raises(BaseModelError, match=rf"model\.trust_remote_code is owner/model@{commit}"):
        find_base_model(pins(store), f"owner/model/{commit}", f"owner/model@{commit}")


@pytest.mark.parametrize("content", [b"[", b"[" * 100_000, b'{"sha256": {"config.json": 1}}', b"x" * (5 << 20)])
def test_an_unreadable_record_is_asked_for_again(
    store: ArtifactStore, mallory: ArtifactStore, model: Path, commit: str, hub: Hub, content: bytes
) -> None:
    ref = mallory.publish(model, KIND, f"owner/model/{commit}", "f" * 64, {})
    store.objects.put(f"alice/pins/models/owner/model/{commit}.json", content)
    assert find_base_model(pins(store), f"owner/model/{commit}") == ref
    assert pins(store).hashes("owner/model", commit) == folder_hashes(model)


def test_what_was_downloaded_has_the_hashes_that_are_compared(hub: Hub, commit: str, tmp_path: Path) -> None:
    files, hashes = collect(locate("owner/model", "main", tmp_path))
    assert hashes == {name: sha256(path) for name, path in files.items()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hashes.keys()


def test_a_manifest_that_changes_after_it_was_compared_is_refused(
    store: ArtifactStore, mallory: ArtifactStore, model: Path, tmp_path: Path
) -> None:
    revision = folder_revision(folder_hashes(model))
    name = f"local/model/{revision}"
    store.publish(model, KIND, name, "f" * 64, {})
    ref = find_base_model(pins(store), name)
    assert ref
    folder = changed(model, tmp_path, "modeling.py", "import os")
    other = mallory.publish(folder, KIND, name, "f" * 64, {}, replace=True)
    with pytest.raises(ForeignContent, match=revision):
        store.fetch(ref)
    manifest = mallory.manifest(KIND, name)
    assert manifest
    for path in Path(other.uri.removeprefix("file://")).iterdir():
        shutil.copy(path, Path(ref.uri.removeprefix("file://")) / path.name)
    mallory.objects.put(f"{KIND}/{name}/manifest.json", replace(manifest, folder=ref.attempt).to_json())
    with pytest.raises(ForeignContent, match=revision):
        store.fetch(ref)


def test_a_base_model_refers_to_no_other(store: ArtifactStore, project: TestProject, model: Path) -> None:
    """`same_as` redirects to an earlier artifact, but not from what others may write."""
    lineage_store = project.store
    source = locate("demo-base", "main", project.root)
    name = f"{source.repo}/{source.revision}"
    ref = lineage_store.publish(dict(collect(source)[0]), KIND, name, "f" * 64, {"same_as": "e" * 64})
    assert find_base_model(pins(lineage_store), name) == ref


def text_import(tmp_path: Path) -> Import:
    path = tmp_path / "general.txt"
    path.write_text("text")
    return Import("a" * 64, {"text.txt": path}, {}, {"text.txt": folder_hashes(tmp_path)["general.txt"]})


def folder_import(tmp_path: Path) -> Import:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "task.yaml").write_text("task: mine")
    return Import("a" * 64, folder, {}, folder_hashes(folder))


@pytest.mark.parametrize("make", [text_import, folder_import])
def test_an_import_of_somebody_else_is_refused(
    tmp_path: Path, make: Callable[[Path], Import], store: ArtifactStore
) -> None:
    item = make(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "task.yaml").write_text("task: !function evil.run")
    store.publish(tmp_path / "theirs", "imports", item.fingerprint, item.fingerprint, {})
    with pytest.raises(ForeignContent, match=item.fingerprint):
        import_external(store, item)
    store.publish(item.files, "imports", item.fingerprint, item.fingerprint, {}, replace=True)
    ref: ArtifactRef = import_external(store, item)
    assert store.verify(ref.kind, ref.name) == []
