"""Who may read what this project writes: nobody else by default, the group where asked for."""

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from store.folders import contents, make_folder

from finetune_assets.store import cache as cache_module
from finetune_assets.store.artifacts import ArtifactStore, open_store
from finetune_assets.store.cache import flat
from finetune_assets.store.errors import StoreError
from finetune_assets.store.reference import ArtifactRef


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(folder: Path) -> tuple[set[str], set[str]]:
    """Modes of the folders and of the files below and with a folder, in octal."""
    paths = [folder, *folder.rglob("*")]
    found = [(path.is_dir(), f"{stat.S_IMODE(path.lstat().st_mode):o}") for path in paths]
    return {mode for is_dir, mode in found if is_dir}, {mode for is_dir, mode in found if not is_dir}


def used(tmp_path: Path, busy: list[tuple[set[str], set[str]]]) -> ArtifactStore:
    """A store and a cache in which an artifact was published and fetched; adds the modes in the cache meanwhile."""
    store = open_store(f"file://{tmp_path}/data/store", "me", tmp_path / "data" / "cache")
    made = tmp_path / "made"
    if not made.exists():
        make_folder(made)
    ref = store.publish(made, "raw", "f1", "f1", {})
    assert contents(store.fetch(ref)) == contents(made)
    store.objects.create("me/champions/demo/00000001.json", b"{}")
    with store.cache.workspace("job"), store.cache.exclusive("raw/f1", "testing"):
        busy.append(modes(store.cache.root))
    return store


@pytest.mark.usefixtures("umask")
def test_private_by_default(tmp_path: Path) -> None:
    busy: list[tuple[set[str], set[str]]] = []
    used(tmp_path, busy)
    for folders, files in (modes(tmp_path / "data"), *busy):
        assert folders == {"700"}
        assert files <= {"600", "400"}


@pytest.mark.usefixtures("umask")
def test_for_the_group_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_GROUP_ACCESS", "1")
    busy: list[tuple[set[str], set[str]]] = []
    used(tmp_path, busy)
    for folders, files in (modes(tmp_path / "data"), *busy):
        assert folders == {"770"}
        assert files <= {"660", "440"}


def test_another_value_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_GROUP_ACCESS", "yes")
    with pytest.raises(StoreError, match="FINETUNE_GROUP_ACCESS: 'yes'"):
        used(tmp_path, [])


def test_a_folder_keeps_the_group_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_GROUP_ACCESS", "1")
    root = tmp_path / "data" / "store"
    root.mkdir(parents=True)
    root.chmod(0o2770)
    used(tmp_path, [])
    assert stat.S_IMODE((root / "me" / "raw").stat().st_mode) == 0o2770


def test_stores_and_caches_of_earlier_versions_stay_usable(tmp_path: Path) -> None:
    store = used(tmp_path, [])
    for lock in cache_module._HELD.values():
        lock.release()
    cache_module._HELD.clear()
    for path in (tmp_path / "data", *(tmp_path / "data").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    again = used(tmp_path, [])
    assert again.verify("raw", "f1") == []
    assert stat.S_IMODE(store.cache.root.stat().st_mode) == 0o700, "an open cache is closed"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can play another user")
@pytest.mark.parametrize("shared", ["", "1"])
def test_another_user_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str) -> None:
    monkeypatch.setenv("FINETUNE_GROUP_ACCESS", shared)
    used(tmp_path, [])
    files = [str(path) for path in (tmp_path / "data").rglob("*") if path.is_file()]
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/") and folder.name.startswith("pytest-"):
            folder.chmod(0o755)
    if (child := os.fork()) == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        opened = 0
        for file in files:
            try:
                opened += len(Path(file).read_bytes()) >= 0
            except OSError:
                continue
        os._exit(0 if opened == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert files


NAMES = ["x--y/z", "x/y--z", "x/y/z", "x-/y", "x/-y", "x--y--z", "x%2D-y/z", "x%2D%2Dy/z", "x---y", "a-b/c", "a/b-c"]


def test_no_two_artifacts_share_a_cache_entry() -> None:
    assert len({flat(name) for name in NAMES}) == len(NAMES)
    assert flat("base-models/packaged/demo-base/abc") == "base-models--packaged--demo-base--abc", "as ever"


@pytest.mark.parametrize(("first", "second"), [("x--y/z", "x/y--z"), ("a-/b", "a/-b")])
def test_of_similar_names_each_gets_its_own_files(tmp_path: Path, first: str, second: str) -> None:
    store = open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")
    refs = []
    for name in (first, second):
        folder = tmp_path / name.replace("/", "_")
        folder.mkdir()
        (folder / "file.txt").write_text(name)
        refs.append(store.publish(folder, "base-models", f"{name}/r", "f" * 64, {}))
    same_attempt = [ArtifactRef(**{**ref.to_dict(), "uri": ref.uri}) for ref in refs]
    assert [(store.fetch(ref) / "file.txt").read_text() for ref in same_attempt] == [first, second]


@pytest.mark.parametrize("field", ["fingerprint", "kind"])
def test_a_cached_manifest_of_another_artifact_is_not_used(tmp_path: Path, field: str) -> None:
    store = open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")
    folder = make_folder(tmp_path / "made")
    ref = store.publish(folder, "raw", "f1", "f1", {})
    cached = store.fetch(ref)
    manifest = cached.with_name(f"{ref.attempt}.json")
    other = store.cache.entry("me/raw/f1", ref.attempt).manifest()
    assert other
    manifest.write_bytes(replace(other, **{field: "other"}).to_json())
    assert contents(store.fetch(ref)) == contents(folder)
    assert store.cache.entry("me/raw/f1", ref.attempt).manifest() == other, "it was read again from the store"


@pytest.mark.parametrize("attempt", ["..", ".", "", "a/b"])
def test_an_attempt_outside_the_cache_is_refused(tmp_path: Path, attempt: str) -> None:
    store = open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")
    with pytest.raises(StoreError, match="raw/f1"):
        store.cache.entry("me/raw/f1", attempt)
