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
from tiers import SOAK

from finetune_assets.store.artifacts import open_store

PROCESSES, BIG = (8, 150 << 20) if os.environ.get("SOAK") else (4, 10 << 20)

FETCH = """
import sys
from pathlib import Path
from finetune_assets.store.artifacts import open_store
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


def at_once(script: str, arguments: list[list[str]]) -> list[str]:
    """Run processes at the same time; what each printed."""
    commands = [[sys.executable, "-c", script, *one] for one in arguments]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running)
    return outputs


def test_one_cache_downloads_once(proxied: Proxy, ceph: Bucket, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "made", BIG)
    open_store(ceph.url, "me", tmp_path / "other").publish(folder, "raw", "f", "f", {})
    ended = at_once(FETCH, [[ceph.url, str(tmp_path / "cache")]] * PROCESSES)
    (where,) = set(ended)
    assert contents(Path(where.strip())) == contents(folder)
    assert proxied.count(r"^GET .*/big\.bin") == 1
    assert proxied.count(r"^GET .*/small\.txt") == 1


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_many_writers_have_one_winner(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"file://{tmp_path}/store" if kind == "file" else request.getfixturevalue("ceph").url
    folders = [make_folder(tmp_path / f"made{i}", BIG) for i in range(PROCESSES)]
    arguments = [[url, str(tmp_path / f"cache{i}"), str(folder)] for i, folder in enumerate(folders)]
    (uri,) = {out.strip() for out in at_once(PUBLISH, arguments)}
    store = open_store(url, "me", tmp_path / "cache")
    ref = store.find("raw", "f")
    assert ref
    assert ref.uri == uri
    assert contents(store.fetch(ref)) in [contents(folder) for folder in folders], "one writer's, not a mixture"
    assert {stored.key.split("/")[3] for stored in store.objects.listing()} == {"manifest.json", ref.attempt}


PEAK = """
import sys
from pathlib import Path
from finetune_assets.training.process_memory import peak_resident_mib
from finetune_assets.store.artifacts import open_store
what, url, cache, made = sys.argv[1:]
store = open_store(url, "me", Path(cache))
ref = store.find("raw", "f")  # connected, and all is imported
before = peak_resident_mib()
if what == "publish":
    store.publish(Path(made), "raw", "f", "f", {})
else:
    store.fetch(ref)
print(round(peak_resident_mib() - before))
"""


@pytest.mark.parametrize(
    ("kind", "size_mib", "most_mib"),
    [
        pytest.param("file", 512, 300, marks=pytest.mark.system),
        pytest.param("file", 1024, 400, marks=SOAK),
        pytest.param("s3", 1024, 400, marks=SOAK),
        pytest.param("file", 4096, 400, marks=pytest.mark.soak),
        pytest.param("s3", 4096, 400, marks=pytest.mark.soak),
    ],
)
def test_memory_does_not_grow_with_the_artifact(
    kind: str, size_mib: int, most_mib: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"file://{tmp_path}/store" if kind == "file" else request.getfixturevalue("ceph").url
    made = tmp_path / "made"
    made.mkdir()
    for i in range(4):
        with open(made / f"model-{i}.safetensors", "wb") as file:
            file.truncate(size_mib << 18)
    for what in ("publish", "fetch"):
        (grown,) = at_once(PEAK, [[what, url, str(tmp_path / "cache"), str(made)]])
        print(f"{what} {size_mib} MiB, {kind}: {grown.strip()} MiB more")
        assert int(grown) < most_mib
    store = open_store(url, "me", tmp_path / "cache")
    ref = store.find("raw", "f")
    assert ref
    fetched = store.fetch(ref) / "model-3.safetensors"
    with open(fetched, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = store.manifest("raw", "f")
    assert manifest
    assert digest == manifest.files[3].sha256
