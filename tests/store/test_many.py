"""Many processes at once: on one machine's cache they share one download, on many the store has one winner."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers.proxy import Proxy
from servers.s3 import Bucket
from store.folders import contents, make_folder

from finetune_assets.store.artifacts import open_store

PROCESSES = 8

FETCH = """
import logging, sys
from pathlib import Path
from finetune_assets.store.artifacts import open_store
logging.basicConfig(level="INFO", format="%(message)s")
url, cache = sys.argv[1:]
store = open_store(url, "me", Path(cache))
print(store.fetch(store.find("raw", "f")))
"""
PUBLISH = """
import sys
from pathlib import Path
from finetune_assets.store.artifacts import open_store
url, cache, made = sys.argv[1:]
print(open_store(url, "me", Path(cache)).publish(Path(made), "raw", "f", "f", {}).uri)
"""


def at_once(script: str, arguments: list[list[str]]) -> list[tuple[str, str]]:
    """Run processes at the same time; each one's stdout and stderr."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", script, *one], **pipes) for one in arguments]
    ended = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * len(running), ended
    return ended


def test_one_cache_downloads_once(proxied: Proxy, ceph: Bucket, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "made", 150 << 20)
    open_store(ceph.url, "me", tmp_path / "other").publish(folder, "raw", "f", "f", {})
    ended = at_once(FETCH, [[ceph.url, str(tmp_path / "cache")]] * PROCESSES)
    (where,) = {out for out, _ in ended}
    assert contents(Path(where.strip())) == contents(folder)
    assert proxied.count(r"^GET .*/big\.bin") == 1
    assert proxied.count(r"^GET .*/small\.txt") == 1
    waited = sum("waiting for process" in err for _, err in ended)
    fetched = sum("fetching" in err.replace("waiting", "") for _, err in ended)
    assert fetched >= 1
    print(f"{waited} of {PROCESSES} were told whom they wait for")


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_many_writers_have_one_winner(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"file://{tmp_path}/store" if kind == "file" else request.getfixturevalue("ceph").url
    folders = [make_folder(tmp_path / f"made{i}", 30 << 20) for i in range(PROCESSES)]
    arguments = [[url, str(tmp_path / f"cache{i}"), str(folder)] for i, folder in enumerate(folders)]
    (uri,) = {out.strip() for out, _ in at_once(PUBLISH, arguments)}
    store = open_store(url, "me", tmp_path / "cache")
    ref = store.find("raw", "f")
    assert ref
    assert ref.uri == uri
    assert contents(store.fetch(ref)) in [contents(folder) for folder in folders], "one writer's, not a mixture"
    assert {stored.key.split("/")[3] for stored in store.objects.listing()} == {"manifest.json", ref.attempt}


MOST_MIB = 500
PEAK = """
import sys
from pathlib import Path
from finetune_assets.resident import peak_resident_mib
from finetune_assets.store.artifacts import open_store
what, url, cache, made = sys.argv[1:]
store = open_store(url, "me", Path(cache))
if what == "publish":
    store.publish(Path(made), "raw", "f", "f", {})
else:
    store.fetch(store.find("raw", "f"))
print(round(peak_resident_mib()))
"""


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_memory_does_not_grow_with_the_artifact(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    size = (4 << 30) if os.environ.get("SOAK") else (1 << 30)
    url = f"file://{tmp_path}/store" if kind == "file" else request.getfixturevalue("ceph").url
    made = tmp_path / "made"
    made.mkdir()
    for i in range(4):
        with open(made / f"model-{i}.safetensors", "wb") as file:
            file.truncate(size // 4)
    for what in ("publish", "fetch"):
        ((out, _),) = at_once(PEAK, [[what, url, str(tmp_path / "cache"), str(made)]])
        print(f"{what} {size >> 30} GiB, {kind}: peak {out.strip()} MiB")
        assert int(out) < MOST_MIB
    store = open_store(url, "me", tmp_path / "cache")
    ref = store.find("raw", "f")
    assert ref
    fetched = store.fetch(ref) / "model-3.safetensors"
    with open(fetched, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = store.manifest("raw", "f")
    assert manifest
    assert digest == manifest.files[3].sha256
