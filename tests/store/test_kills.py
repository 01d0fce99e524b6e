"""kill -9 at any moment of publishing and fetching, in a folder and on a real S3 server.

A half artifact is visible 0 times, a wrong byte is read 0 times, and a plain re-run always completes. For every change
this is run on S3; kills on a folder are also in test_artifacts.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers.s3 import Bucket
from store.folders import contents, make_folder

from finetune_assets.store.artifacts import ArtifactStore, open_store
from finetune_assets.store.cache import RESERVED

BIG, PART = (60 << 20, 8 << 20) if os.environ.get("SOAK") else (5 << 20, 1 << 20)
"""Bytes of the large file and of its parts."""

ACT = """
import sys
from pathlib import Path
from finetune_assets.store import objects
from finetune_assets.store.artifacts import open_store
what, url, cache, made, name, part = sys.argv[1:]
objects.PART = int(part)
store = open_store(url, "me", Path(cache))
ref = store.find("raw", name)  # connected, and all is imported
print("ready", flush=True)
if what == "publish":
    store.publish(Path(made), "raw", name, name, {})
else:
    store.fetch(ref)
print("done", flush=True)
"""


CASES = pytest.mark.parametrize(
    ("url", "kills"),
    [
        ("s3", 2),
        pytest.param("file", 4, marks=pytest.mark.system),
        *(pytest.param(kind, 50, marks=pytest.mark.soak) for kind in ("file", "s3")),
    ],
    indirect=["url"],
)


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/store"
    bucket: Bucket = request.getfixturevalue("ceph")
    return bucket.url


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("kills") / "made", BIG)


def act(what: str, url: str, cache: Path, made: Path, name: str, kill_after: float | None = None) -> float | None:
    """Let a process do something, and kill it so many seconds after it began; how long it took if it was not."""
    command = [sys.executable, "-c", ACT, what, url, str(cache), str(made), name, str(PART)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None
        assert process.stdout.readline() == "done\n"
        return time.monotonic() - began


@CASES
def test_publishing_survives_kills(url: str, kills: int, made: Path, tmp_path: Path) -> None:
    store, rng, content = open_store(url, "me", tmp_path / "cache"), random.Random(4), contents(made)
    seconds = min(act("publish", url, tmp_path / "cache", made, f"whole{i}") or 0 for i in range(2))
    visible = 0
    for i in range(kills):
        name = f"p{i}"
        act("publish", url, tmp_path / "cache", made, name, kill_after=rng.uniform(0, seconds))
        fresh = open_store(url, "me", tmp_path / f"fresh{i}")
        if ref := fresh.find("raw", name):
            visible += 1
            assert contents(fresh.fetch(ref)) == content, "what is visible is whole"
        assert act("publish", url, tmp_path / "cache", made, name), "a plain re-run completes"
        assert store.verify("raw", name) == []
        forget(store, tmp_path / f"fresh{i}", name)
    print(f"{kills} kills while publishing, {visible} of them after the manifest was there")


@CASES
def test_fetching_survives_kills(url: str, kills: int, made: Path, tmp_path: Path) -> None:
    store, rng, content = open_store(url, "me", tmp_path / "cache"), random.Random(5), contents(made)
    ref = store.publish(made, "raw", "f", "f", {})
    seconds = min(act("fetch", url, tmp_path / f"whole{i}", made, "f") or 0 for i in range(2))
    for i in range(kills):
        cache = tmp_path / f"cache{i}"
        act("fetch", url, cache, made, "f", kill_after=rng.uniform(0, seconds))
        for path in cache.glob("artifacts/*/*/**/*"):
            if path.is_file():
                relative = path.relative_to(next(cache.glob("artifacts/*/*/"))).as_posix()
                assert path.read_bytes() == content[relative], "a file is there whole, or not at all"
        assert act("fetch", url, cache, made, "f") is not None, "a plain re-run completes"
        here = open_store(url, "me", cache)
        assert contents(here.fetch(ref)) == content
        half = [path for path in cache.glob("partial/**/*") if path.is_file()]
        assert {path.name for path in half} <= {RESERVED}, "no part of a file is left"
        with here.cache.workspace("next"):
            assert not [*cache.glob("partial/*")], "nothing half outlives the next use of the cache"
        forget(store, cache, None)


def forget(store: ArtifactStore, folder: Path, name: str | None) -> None:
    """Give the disk space back."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if name:
        prefix = store.prefix("raw", name)
        store.objects.delete([stored.key for stored in store.objects.listing(prefix)])
