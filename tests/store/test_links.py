"""A store in a shared folder: links that another user plants in it are never followed, and nothing is deleted through
one."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from commands import run
from store.folders import contents, make_folder

from finetune_assets.store.artifacts import ArtifactStore, open_store
from finetune_assets.store.checkpoints import Checkpoints
from finetune_assets.store.errors import StoreError
from finetune_assets.store.gc import inventory

OLD_ATTEMPT = "20200101T000000Z-aaaaaaaa"
LATER = datetime.now(UTC) + timedelta(days=30)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """A colleague's folder outside the store, old enough to be garbage if it were in it."""
    folder = tmp_path / "thesis"
    (folder / "chapters").mkdir(parents=True)
    (folder / "chapters" / "one.tex").write_text("thirty years")
    (folder / "manifest.json").write_text("{}")
    (folder / "claim.json").write_text("{}")
    (folder / "draft.bin#7").write_text("half")
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    return folder


def link(store: ArtifactStore, key: str, target: Path) -> None:
    path = Path(store.url.removeprefix("file://")) / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


PLACES = (
    f"base-models/x/{OLD_ATTEMPT}",
    f"me/raw/dead/{OLD_ATTEMPT}/sub",
    "me/jobs/f1-abc",
    "me/raw",
    "me/checkpoints/f1/000001",
    "me/pins",
)


@pytest.mark.parametrize("key", PLACES)
def test_gc_skips_a_link_and_reports_it_once(
    store: ArtifactStore,
    thesis: Path,
    tmp_path: Path,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"STORE": store.url, "NAMESPACE": "me", "CACHE": store.cache.root, "CONFIGS": tmp_path}.items():
        monkeypatch.setenv(f"FINETUNE_{name}", str(value))
    before = contents(thesis)
    link(store, key, thesis)
    code, said, _ = run(capsys, "store", "gc", "--delete", "--older-than", "0")
    assert code == 0
    assert contents(thesis) == before
    assert said.count(f"{key}: ") == 1
    code, said, _ = run(capsys, "store", "verify")
    assert code == 1, "a link in the store is a problem"
    assert said.count(f"{key}: ") == 1
    assert contents(thesis) == before


def test_a_link_hides_no_file_of_an_artifact(store: ArtifactStore, thesis: Path, tmp_path: Path) -> None:
    ref = store.publish(make_folder(tmp_path / "made"), "raw", "f1", "f1", {})
    link(store, "you", thesis)
    listed = inventory(store.objects)
    assert [artifact.name for artifact in listed.artifacts] == ["f1"]
    assert list(listed.skipped) == ["you"]
    assert contents(store.fetch(ref)) == contents(tmp_path / "made")


def test_checkpoints_are_cleared_without_following_a_link(store: ArtifactStore, thesis: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(store, "f1", {}, tmp_path / "local", keep=2)
    before = contents(thesis)
    link(store, "me/checkpoints/f1/000000/step-9", thesis)
    link(store, "me/checkpoints/f1/000000/manifest.json", thesis / "manifest.json")
    checkpoints.clear()
    assert contents(thesis) == before
    assert [stored.key for stored in store.objects.listing("me/checkpoints/f1")] == []


def test_unfinished_uploads_behind_a_link_stay(store: ArtifactStore, thesis: Path) -> None:
    own = Path(store.url.removeprefix("file://")) / "me" / "raw" / "f1" / "big.bin#12"
    own.parent.mkdir(parents=True)
    own.write_text("half")
    before = contents(thesis)
    link(store, "me/raw/f2", thesis)
    assert store.objects.abort_uploads("me/", LATER, dry_run=False) == ["me/raw/f1/big.bin#12"]
    assert not own.exists()
    assert contents(thesis) == before


@pytest.mark.parametrize("act", ["put", "create", "upload", "delete", "get", "stream", "listing"])
@pytest.mark.parametrize("place", ["folder", "file"])
def test_no_operation_follows_a_link(store: ArtifactStore, thesis: Path, act: str, place: str) -> None:
    before = contents(thesis)
    if place == "folder":
        link(store, "me/raw", thesis)
        key = "me/raw/chapters/one.tex"
    else:
        link(store, "me/raw/one.tex", thesis / "chapters" / "one.tex")
        key = "me/raw/one.tex"
    objects = store.objects
    acts = {
        "put": lambda: objects.put(key, b"mine"),
        "create": lambda: objects.create(key, b"mine"),
        "upload": lambda: objects.upload(key, 4, lambda: iter([b"mine"])),
        "delete": lambda: objects.delete([key]),
        "get": lambda: objects.get(key),
        "stream": lambda: list(objects.stream(key)),
        "listing": lambda: [stored.key for stored in objects.listing("me/raw")],
    }
    if act == "listing":
        assert acts[act]() == []
    elif place == "file" and act in ("put", "upload", "delete"):
        acts[act]()  # the link itself is replaced, or removed
        path = Path(store.url.removeprefix("file://")) / key
        assert not path.is_symlink()
    else:
        with pytest.raises(StoreError, match="me/raw"):
            acts[act]()
    assert contents(thesis) == before


def test_a_link_that_appears_between_listing_and_deletion_is_not_followed(store: ArtifactStore, thesis: Path) -> None:
    store.objects.put("me/raw/f1/chapters/one.tex", b"mine")
    keys = [stored.key for stored in store.objects.listing("me")]
    folder = Path(store.url.removeprefix("file://")) / "me" / "raw" / "f1"
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(thesis)
    before = contents(thesis)
    with pytest.raises(StoreError, match="me/raw/f1"):
        store.objects.delete(keys)
    assert contents(thesis) == before


@pytest.mark.parametrize("kind", ["pipe", "deep", "loop"])
def test_what_is_no_file_does_not_end_a_listing(store: ArtifactStore, tmp_path: Path, kind: str) -> None:
    store.publish(make_folder(tmp_path / "made"), "raw", "f1", "f1", {})
    root = Path(store.url.removeprefix("file://")) / "you"
    root.mkdir()
    if kind == "pipe":
        os.mkfifo(root / "manifest.json")
        with pytest.raises(StoreError, match=r"you/manifest\.json"):
            store.objects.get("you/manifest.json")
    elif kind == "loop":
        (root / "me").symlink_to(root)
    else:
        Path(root, *["d"] * 200).mkdir(parents=True)
    listed = inventory(store.objects)
    assert [artifact.name for artifact in listed.artifacts] == ["f1"]
    assert len(listed.skipped) == 1


def test_keys_that_lead_outside_are_refused(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("secret")
    for key in ("../outside.txt", "me/../../outside.txt", "/etc/passwd", "me//x", "me/./x"):
        with pytest.raises(StoreError, match="key"):
            store.objects.get(key)
        with pytest.raises(StoreError, match="key"):
            store.objects.put(key, b"x")
    assert (tmp_path / "outside.txt").read_text() == "secret"


@pytest.mark.parametrize("place", ["root", "above"])
def test_the_root_itself_may_be_a_link_or_below_one(tmp_path: Path, place: str) -> None:
    (tmp_path / "disk" / "store").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / ("store" if place == "root" else ""))
    store = open_store(f"file://{tmp_path}/link/{'' if place == 'root' else 'store'}", "me", tmp_path / "cache")
    ref = store.publish(make_folder(tmp_path / "made"), "raw", "f1", "f1", {})
    assert contents(store.fetch(ref)) == contents(tmp_path / "made")
    assert (tmp_path / "disk" / "store" / "me" / "raw" / "f1" / "manifest.json").is_file()
    assert inventory(store.objects).skipped == {}
