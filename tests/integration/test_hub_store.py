"""Many runs want one model of the Hub at once: it is downloaded once, whether they share a machine or only a store."""

import os
import sys
from pathlib import Path

import pytest
from integration.cli import run_at_once
from projects import TestProject
from servers.hub import Hub
from servers.proxy import Proxy
from servers.s3 import Bucket

from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.store.artifacts import open_store

PROCESSES = 8
FILES = 5
"""Of the model, those that training reads."""

ASK = """
import logging
import dagster as dg
from finetune_assets.assets.cached_base_model import cached_base_model
from finetune_assets.resources.project import Project
from finetune_assets.resources.io_manager import ArtifactIOManager
project = Project()
resources = {"project": project, "io_manager": ArtifactIOManager(project=project, others=dg.FilesystemIOManager())}
run = dg.materialize([cached_base_model], partition_key="demo", resources=resources)
print(project.store().fetch(run.output_for_node("cached_base_model")))
"""


@pytest.fixture
def commit(project: TestProject, hub: Hub) -> str:
    demo = project.configs / "experiments" / "demo.yaml"
    demo.write_text(demo.read_text().replace("base_model: demo-base", "base_model: owner/model"))
    return hub.add("owner/model", {path.name: path.read_bytes() for path in PACKAGED["demo-base"].iterdir()})


def environment(node: Path) -> dict[str, str]:
    """Of a machine of its own."""
    return {**os.environ, "FINETUNE_CACHE": str(node / "cache"), "HF_HOME": str(node / "hub")}


def downloads(hub: Hub) -> int:
    return sum(request.startswith("GET") and "model.safetensors" in request for request in hub.requests)


def same_as_packaged(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    same = all((folder / name).read_bytes() == (PACKAGED["demo-base"] / name).read_bytes() for name in names)
    return same and len(names) == FILES


@pytest.mark.soak
@pytest.mark.system
def test_processes_of_one_machine_share_one_download(
    commit: str, hub: Hub, ceph: Bucket, proxied: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_STORE", ceph.url)
    ended = run_at_once([sys.executable, "-c", ASK], [environment(tmp_path / "node")] * PROCESSES)
    assert downloads(hub) == 1
    assert proxied.count(r"^(PUT|POST) .*model\.safetensors") == 1, "published once"
    assert proxied.count(r"^GET .*model\.safetensors") == 1, "one download from the store"
    (where,) = {out.strip().splitlines()[-1] for out in ended}
    assert same_as_packaged(Path(where))


@pytest.mark.soak
@pytest.mark.system
def test_machines_that_share_a_store_have_one_winner(
    commit: str, hub: Hub, ceph: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_STORE", ceph.url)
    nodes = [tmp_path / f"node{i}" for i in range(PROCESSES)]
    ended = run_at_once([sys.executable, "-c", ASK], [environment(node) for node in nodes])
    assert all(same_as_packaged(Path(out.strip().splitlines()[-1])) for out in ended)
    store = open_store(ceph.url, "tests", tmp_path / "cache")
    assert store.verify("base-models", f"owner/model/{commit}") == []
    stored = [key for key in ceph.listed() if "/base-models/" in key]
    assert len(stored) == 1 + FILES, "the losers have removed theirs"
