"""The store's promises: whole or not there, verified, first writer wins."""

import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.store.artifacts import ArtifactStore, open_store
from finetune_assets.store.errors import ArtifactMissing, CorruptArtifact, StoreError
from finetune_assets.store.manifest import FileEntry, ManifestError

KILLS, WRITERS = (60, 8) if os.environ.get("SOAK") else (3, 4)
SIZE = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(os.urandom(SIZE))
    (folder / "sub" / "b.txt").write_text("b")
    return folder


def manifest_path(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "store").rglob("manifest.json")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_fetched_is_what_was_published(store: ArtifactStore, folder: Path) -> None:
    assert store.find("raw", "f1") is None
    ref = store.publish(folder, "raw", "f1", "f1", {"source": "x"})
    assert store.find("raw", "f1") == ref
    assert (ref.files, ref.size) == (2, SIZE + 1)
    assert contents(store.fetch(ref)) == contents(folder)


def test_files_lie_as_files_where_the_reference_says(store: ArtifactStore, folder: Path) -> None:
    ref = store.publish(folder, "raw", "f1", "f1", {})
    assert contents(Path(ref.uri.removeprefix("file://"))) == contents(folder)


def test_only_what_is_wanted_is_fetched(store: ArtifactStore, folder: Path) -> None:
    ref = store.publish(folder, "raw", "f1", "f1", {})
    assert set(contents(store.fetch(ref, lambda path: path == "sub/b.txt"))) == {"sub/b.txt"}
    assert set(contents(store.fetch(ref))) == {"a.bin", "sub/b.txt"}


def test_cut_cache_file_is_fetched_again(store: ArtifactStore, folder: Path) -> None:
    ref = store.publish(folder, "raw", "f1", "f1", {})
    (store.fetch(ref) / "a.bin").write_bytes(b"")
    assert contents(store.fetch(ref)) == contents(folder)


def test_without_its_manifest_an_artifact_does_not_exist(store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    store.publish(folder, "raw", "f1", "f1", {})
    manifest_path(tmp_path).unlink()
    assert store.find("raw", "f1") is None
    with pytest.raises(ArtifactMissing, match="dolly_raw"):
        store.resolve("raw", "f1", made_by="dolly_raw")


def test_second_writer_gets_the_firsts_artifact(store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    first = store.publish(folder, "raw", "f1", "f1", {})
    (folder / "sub" / "b.txt").write_text("other")
    assert store.publish(folder, "raw", "f1", "f1", {}) == first
    stored = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(stored) == 3
    assert (store.fetch(first) / "sub" / "b.txt").read_text() == "b"


def test_replacing_is_seen_at_once_and_whole(store: ArtifactStore, folder: Path) -> None:
    first = store.publish(folder, "raw", "f1", "f1", {})
    old = store.fetch(first)
    (folder / "sub" / "b.txt").write_text("other")
    second = store.publish(folder, "raw", "f1", "f1", {}, replace=True)
    assert (store.fetch(second) / "sub" / "b.txt").read_text() == "other"
    assert (old / "sub" / "b.txt").read_text() == "b"


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
def test_damaged_file_is_refused_and_leaves_nothing(
    store: ArtifactStore, folder: Path, tmp_path: Path, damage: str
) -> None:
    ref = store.publish(folder, "raw", "f1", "f1", {})
    victim = Path(ref.uri.removeprefix("file://")) / "a.bin"
    body = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    else:
        body[1000] ^= 1
        victim.write_bytes({"flip": bytes(body), "cut": bytes(body[:-1]), "grow": bytes(body) + b"x"}[damage])
    with pytest.raises(CorruptArtifact, match=r"a\.bin"):
        store.fetch(ref)
    assert not any("a.bin" in path.name for path in (tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("path", ["../out", "/etc/passwd", "a/../../b", "sub/../a", "", ".", "a\\b", "./a", "a//b"])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_manifest_that_leads_outside_is_refused(
    store: ArtifactStore, folder: Path, tmp_path: Path, path: str, place: str
) -> None:
    ref = store.publish(folder, "raw", "f1", "f1", {})
    manifest = store.manifest("raw", "f1")
    assert manifest
    first, *rest = manifest.files
    bad = (
        replace(manifest, files=(replace(first, path=path), *rest))
        if place == "file"
        else replace(manifest, folder=path)
    )
    manifest_path(tmp_path).write_bytes(bad.to_json())
    with pytest.raises(ManifestError, match=re.escape(f"'{path}'")):
        store.fetch(ref)
    assert not (tmp_path / "cache" / "artifacts").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "tokenized"},
        {"fingerprint": "f2"},
        {"folder": "a/b"},
        {"created": "yesterday"},
        {"files": (FileEntry("a.bin", -1, "0" * 64),)},
        {"files": (FileEntry("a.bin", 1, "no hash"),)},
        {"files": (FileEntry("a.bin", 1, "0" * 64),) * 2},
    ],
)
def test_manifest_that_cannot_be_is_refused(
    store: ArtifactStore, folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    store.publish(folder, "raw", "f1", "f1", {})
    manifest = store.manifest("raw", "f1")
    assert manifest
    manifest_path(tmp_path).write_bytes(replace(manifest, **change).to_json())
    with pytest.raises(ManifestError, match=r"me/raw/f1/manifest\.json"):
        store.find("raw", "f1")
    manifest_path(tmp_path).write_bytes(manifest.to_json())
    assert store.find("raw", "f1"), "it was the change"


def test_manifest_with_a_changed_bit_is_refused(store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    store.publish(folder, "raw", "f1", "f1", {"source": "this"})
    manifest_path(tmp_path).write_text(manifest_path(tmp_path).read_text().replace("this", "that"))
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        store.find("raw", "f1")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "files": [{}]}', "null"])
def test_what_is_no_manifest_is_refused(store: ArtifactStore, folder: Path, tmp_path: Path, text: str) -> None:
    store.publish(folder, "raw", "f1", "f1", {})
    manifest_path(tmp_path).write_text(text)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        store.find("raw", "f1")


def test_namespaces_share_base_models_alone(store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    other = open_store(store.url, "you", tmp_path / "cache")
    store.publish(folder, "raw", "f1", "f1", {})
    store.publish(folder, "base-models", "owner/name/commit", "f2", {})
    assert other.find("raw", "f1") is None
    assert other.find("base-models", "owner/name/commit") is not None


@pytest.mark.parametrize("url", ["", "store", "file://relative", "ftp://x/y", "file:/x"])
def test_unusable_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="FINETUNE_STORE"):
        open_store(url, "me", tmp_path)


@pytest.mark.parametrize("place", ["file", "under a file"])
def test_store_that_cannot_be_a_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / ("x" if place == "under a file" else "")
    with pytest.raises(StoreError, match="FINETUNE_STORE"):
        open_store(f"file://{path}", "me", tmp_path).find("raw", "f1")


@pytest.mark.parametrize("namespace", ["", "my team", "a/b", "..", "é"])
def test_unusable_namespace_is_refused(tmp_path: Path, namespace: str) -> None:
    with pytest.raises(StoreError, match="FINETUNE_NAMESPACE"):
        open_store(f"file://{tmp_path}/store", namespace, tmp_path)


def test_empty_folder_is_not_published(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=re.escape(f"{tmp_path}/empty")):
        store.publish(tmp_path / "empty", "raw", "f1", "f1", {})


SPAWN = multiprocessing.get_context("spawn")  # the object store client's threads do not survive a fork


def _publish(ready: Event, url: str, folder: Path, cache: Path) -> None:
    store = open_store(url, "me", cache)
    ready.set()
    store.publish(folder, "raw", "f1", "f1", {"by": os.getpid()})


def _fetch(ready: Event, url: str, cache: Path) -> None:
    store = open_store(url, "me", cache)
    ref = store.resolve("raw", "f1", "x")
    ready.set()
    store.fetch(ref)


def _kill_after(target: Callable[..., None], arguments: tuple[object, ...], seconds: float) -> None:
    ready = SPAWN.Event()
    process = SPAWN.Process(target=target, args=(ready, *arguments))
    process.start()
    assert ready.wait(30)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_publisher_and_reader_leave_no_half_artifact(tmp_path: Path, folder: Path, seed: int) -> None:
    """kill -9 at a random moment of publishing, then of fetching; a plain re-run completes."""
    rng = random.Random(seed)
    url, cache = f"file://{tmp_path}/store", tmp_path / "cache"
    for i in range(12):
        (folder / f"{i}.bin").write_bytes(rng.randbytes(1 << 20))
    store = open_store(url, "me", cache)
    _kill_after(_publish, (url, folder, cache), rng.uniform(0.0, 0.06))
    found = store.find("raw", "f1")
    assert found is None or contents(store.fetch(found)) == contents(folder)
    ref = store.publish(folder, "raw", "f1", "f1", {})
    _kill_after(_fetch, (url, cache), rng.uniform(0.0, 0.06))
    assert contents(store.fetch(ref)).items() >= contents(folder).items()


def test_of_many_writers_one_wins(tmp_path: Path, folder: Path) -> None:
    url = f"file://{tmp_path}/store"
    ready = SPAWN.Event()
    writers = [SPAWN.Process(target=_publish, args=(ready, url, folder, tmp_path / "cache")) for _ in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    store = open_store(url, "me", tmp_path / "cache")
    ref = store.resolve("raw", "f1", "x")
    assert contents(store.fetch(ref)) == contents(folder)
    assert len([path for path in (tmp_path / "store").rglob("a.bin") if path.is_file()]) == 1
