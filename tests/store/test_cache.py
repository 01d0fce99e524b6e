"""The node-local cache: no request when warm, bounded, shared, and never handing on what was not verified."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from store.folders import contents, make_folder

from finetune_assets.progress import gigabytes
from finetune_assets.store import cache as cache_module
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore, open_store
from finetune_assets.store.cache import NodeCache
from finetune_assets.store.errors import StoreError
from finetune_assets.store.locks import Lock

MB = 100_000
"""What is a tenth of an artifact here: what holds for small ones holds for large ones."""


@pytest.fixture(autouse=True)
def _forget_what_is_held() -> Iterator[None]:
    """Each test is a process of its own as far as the cache goes."""
    yield
    release_all()


def release_all() -> None:
    for lock in cache_module._HELD.values():
        lock.release()
    cache_module._HELD.clear()


def store_at(tmp_path: Path, limit: int | None = None) -> ArtifactStore:
    return open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache", limit)


def publish(store: ArtifactStore, tmp_path: Path, name: str, size: int) -> ArtifactRef:
    folder = tmp_path / "made" / name
    folder.mkdir(parents=True)
    (folder / "file.bin").write_bytes(os.urandom(size))
    return store.publish(folder, "raw", name, name, {})


def cached(store: ArtifactStore) -> set[str]:
    return {one.entry.name.removeprefix("me--raw--") for one in store.cache.entries()}


def test_warm_cache_asks_the_store_nothing(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    folder = make_folder(tmp_path / "made")
    ref = store.publish(folder, "raw", "f1", "f1", {})
    first = store.fetch(ref)
    shutil.rmtree(tmp_path / "store")
    assert store.fetch(ref) == first
    assert contents(first) == contents(folder)
    assert contents(store_at(tmp_path).fetch(ref, lambda path: path == "empty")) == contents(folder)


def test_file_that_was_written_to_is_fetched_again(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    folder = make_folder(tmp_path / "made")
    ref = store.publish(folder, "raw", "f1", "f1", {})
    victim = store.fetch(ref) / "sub" / "small.txt"
    victim.chmod(0o644)
    victim.write_text("SMALL")
    assert contents(store.fetch(ref)) == contents(folder), "its size is the same, its time is not"


def test_file_that_the_manifest_does_not_name_is_never_handed_on(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    folder = make_folder(tmp_path / "made")
    ref = store.publish(folder, "raw", "f1", "f1", {})
    inside = store.fetch(ref)
    (inside / "modeling_evil.py").write_text("print('planted')")
    (inside / "sub" / "link").symlink_to("/etc/passwd")
    planted = Path(ref.uri.removeprefix("file://")) / "planted.txt"
    planted.write_text("in the store, beside the files")
    assert contents(store.fetch(ref)) == contents(folder)


def test_link_in_place_of_a_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    ref = store.publish(make_folder(tmp_path / "made"), "raw", "f1", "f1", {})
    entry = store.cache.entry(store.prefix("raw", "f1"), ref.attempt)
    entry.folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (entry.folder / "sub").symlink_to(tmp_path / "elsewhere")
    assert (store.fetch(ref) / "sub" / "small.txt").read_text() == "small"
    assert not list((tmp_path / "elsewhere").iterdir()), "nothing was written through the link"


def test_link_in_the_store_is_refused(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    ref = store.publish(make_folder(tmp_path / "made"), "raw", "f1", "f1", {})
    stored = Path(ref.uri.removeprefix("file://")) / "sub" / "small.txt"
    stored.unlink()
    (tmp_path / "same.txt").write_text("small")
    stored.symlink_to(tmp_path / "same.txt")
    with pytest.raises(StoreError, match=r"sub/small\.txt"):
        store.fetch(ref)


def test_link_out_of_a_folder_is_not_published(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "made")
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match="passwd"):
        store_at(tmp_path).publish(folder, "raw", "f1", "f1", {})


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = store_at(tmp_path, limit=35 * MB)
    refs = {name: publish(store, tmp_path, name, 10 * MB) for name in ("a", "b", "c", "d")}
    for name in ("a", "b", "c", "a"):
        store.fetch(refs[name])
        time.sleep(0.02)
    release_all()
    store.fetch(refs["d"])
    assert cached(store) == {"a", "c", "d"}


def test_what_is_in_use_stays_and_the_limit_holds(tmp_path: Path) -> None:
    store = store_at(tmp_path, limit=25 * MB)
    refs = {name: publish(store, tmp_path, name, 10 * MB) for name in ("a", "b", "c")}
    kept = store.fetch(refs["a"])
    store.fetch(refs["b"])
    with pytest.raises(StoreError, match="FINETUNE_CACHE_LIMIT") as error:
        store.fetch(refs["c"])
    assert all(gigabytes(size) in str(error.value) for size in (25 * MB, 10 * MB, 20 * MB)), "limit, size, in use"
    assert cached(store) == {"a", "b"}
    assert contents(kept)
    release_all()
    store.fetch(refs["c"])
    assert cached(store) == {"b", "c"}


HOLD = """
import sys, time
from pathlib import Path
from finetune_assets.store.artifacts import open_store
store = open_store(sys.argv[1], "me", Path(sys.argv[2]))
print(store.fetch(store.find("raw", sys.argv[3])), flush=True)
time.sleep(600)
"""


def test_what_another_process_uses_stays_until_it_dies(tmp_path: Path) -> None:
    store = store_at(tmp_path, limit=15 * MB)
    refs = {name: publish(store, tmp_path, name, 10 * MB) for name in ("a", "b")}
    command = [sys.executable, "-c", HOLD, store.url, str(tmp_path / "cache"), "a"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline()
        with pytest.raises(StoreError, match="FINETUNE_CACHE_LIMIT"):
            store.fetch(refs["b"])
        other.kill()
    store.fetch(refs["b"])
    assert cached(store) == {"b"}


def test_artifact_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    store = store_at(tmp_path, limit=5 * MB)
    ref = publish(store, tmp_path, "a", 10 * MB)
    with pytest.raises(StoreError, match=f"FINETUNE_CACHE_LIMIT.*{gigabytes(5 * MB)}"):
        store.fetch(ref)
    assert cached(store) == set()
    assert not list(store.cache.root.rglob("*.bin"))


def test_part_of_an_artifact_counts_as_that_part(tmp_path: Path) -> None:
    store = store_at(tmp_path, limit=5 * MB)
    ref = store.publish(make_folder(tmp_path / "made", 10 * MB), "raw", "f1", "f1", {})
    assert set(contents(store.fetch(ref, lambda path: path != "big.bin"))) == {"sub/small.txt", "empty"}


def test_full_disk_is_refused_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at(tmp_path)
    ref = publish(store, tmp_path, "a", 10 * MB)
    monkeypatch.setattr(cache_module, "FREE_BYTES", shutil.disk_usage(tmp_path).free)
    with pytest.raises(StoreError, match=r"me--raw--a.*FINETUNE_CACHE"):
        store.fetch(ref)


FULL = """
import json, resource, signal, sys
from pathlib import Path
from finetune_assets.store.artifacts import open_store
from finetune_assets.store.errors import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
store = open_store(sys.argv[1], "me", Path(sys.argv[2]))
try:
    print(store.fetch(store.find("raw", "a")))
except StoreError as e:
    print(json.dumps(str(e)))
"""


@pytest.mark.parametrize("short", [1, 100, 5 * MB])
def test_file_that_cannot_be_written_to_its_end_is_refused(tmp_path: Path, short: int) -> None:
    """The kernel writes what fits and says how much; only the next write fails, and after the last there is none."""
    store = store_at(tmp_path)
    ref = publish(store, tmp_path, "a", 10 * MB)
    command = [sys.executable, "-c", FULL, store.url, str(tmp_path / "cache"), str(10 * MB - short)]
    message = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert os.strerror(errno.EFBIG) in message
    assert "FINETUNE_CACHE" in message
    assert not list((tmp_path / "cache").rglob("*.bin"))
    assert (store.fetch(ref) / "file.bin").stat().st_size == 10 * MB


def test_room_is_made_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at(tmp_path)
    refs = {name: publish(store, tmp_path, name, 10 * MB) for name in ("a", "b")}
    store.fetch(refs["a"])
    release_all()
    monkeypatch.setattr(cache_module, "FREE_BYTES", shutil.disk_usage(tmp_path).free - 5 * MB)
    store.fetch(refs["b"])
    assert cached(store) == {"b"}


def test_what_a_fetch_under_way_has_reserved_is_not_given_away(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, limit=25 * MB)
    first, second = cache.entry("me/raw/a", "1"), cache.entry("me/raw/b", "2")
    first.hold()
    second.hold()
    with cache.filling(first, "fetches a"):
        cache.make_room(first, 20 * MB, 20 * MB)
        with cache.filling(second, "fetches b"), pytest.raises(StoreError, match="FINETUNE_CACHE_LIMIT"):
            cache.make_room(second, 10 * MB, 10 * MB)
    with cache.filling(second, "fetches b"):
        cache.make_room(second, 10 * MB, 10 * MB)


def test_who_waits_says_for_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = NodeCache(tmp_path)
    caplog.set_level(logging.INFO, "finetune_assets")
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with cache.exclusive("x", "fetches base-models/x"):
            logging.getLogger("finetune_assets.test").info("fetching: 1.0 GB of 2.0 GB")
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(20)
    threading.Timer(1.2, leave.set).start()
    with cache.exclusive("x", "fetches base-models/x"):
        thread.join()
    told = [record.getMessage() for record in caplog.records if record.name != "finetune_assets.test"]
    for fact in (str(os.getpid()), "fetches base-models/x", "fetching: 1.0 GB of 2.0 GB"):
        assert any(fact in message for message in told)


def test_lock_files_and_workspaces_go_with_their_holders(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path)
    with cache.workspace("build") as folder, cache.exclusive("x", "does x"):
        assert folder.is_dir()
        with cache.workspace("build") as other:
            assert folder.is_dir(), "one that is in use is not swept away"
            assert other != folder
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


DIE = """
import os, sys
from pathlib import Path
from finetune_assets.store.cache import NodeCache
with NodeCache(Path(sys.argv[1])).workspace("job") as folder:
    (folder / "x").write_text("x")
    os._exit(9)
"""


def test_workspace_of_a_dead_process_is_swept_away(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DIE, str(tmp_path)], check=False)
    assert list(tmp_path.glob("work/*/x"))
    with NodeCache(tmp_path).workspace("job"):
        assert not list(tmp_path.glob("work/*/x"))


def test_lock_is_not_fooled_by_a_file_that_was_removed(tmp_path: Path) -> None:
    first, second, third = (Lock(tmp_path / "lock") for _ in range(3))
    assert first.acquire()
    assert not second.acquire(blocking=False)
    waiting = threading.Thread(target=second.acquire)
    waiting.start()
    time.sleep(0.1)
    first.release(remove=True)
    waiting.join(10)
    assert not third.acquire(blocking=False), "the second has the lock whose file is there"
    second.release(remove=True)
    assert not (tmp_path / "lock").exists()
