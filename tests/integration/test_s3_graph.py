"""The whole graph with its store on a real S3 server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from integration.cli import materialize
from integration.graph import Graph
from projects import SHORT, TestProject
from servers import ceph as ceph_server
from servers.s3 import Bucket

from finetune_assets.artifacts.kinds import REPORTS
from finetune_assets.store.artifacts import open_store
from finetune_assets.store.gc import Inventory, inventory

TOKEN = "hf_planted_token_that_must_not_be_written"


def fingerprints(found: Inventory) -> dict[str, str]:
    """Of all but the page about them, which tells of times."""
    return {one.kind: one.manifest.fingerprint for one in found.artifacts if one.kind != REPORTS.folder}


@pytest.mark.soak
@pytest.mark.system
def test_same_fingerprints_as_in_a_folder_and_no_secret_anywhere(
    project: TestProject, graph: Graph, ceph: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run on S3 is one from the command line, whose output and Dagster home hold no secret either."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    in_folder = graph.run(overrides=SHORT)
    assert in_folder.success, in_folder.log
    in_a_folder = inventory(project.store.objects)
    weights = {(a.kind, f.path): f.sha256 for a in in_a_folder.artifacts for f in a.manifest.files}

    monkeypatch.setenv("FINETUNE_STORE", ceph.url)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "s3cache"))
    on_s3 = materialize(overrides=SHORT)
    assert on_s3.returncode == 0, on_s3.stdout
    store = open_store(ceph.url, "tests", tmp_path / "fresh")
    in_bucket = inventory(store.objects)
    assert fingerprints(in_bucket) == fingerprints(in_a_folder)
    same = {(a.kind, f.path): f.sha256 for a in in_bucket.artifacts for f in a.manifest.files}
    model = ("adapters", "adapter_model.safetensors")
    assert same[model] == weights[model], "and the same adapter, bit by bit"
    assert f"{ceph.url}/tests/adapters/" in on_s3.stdout
    for artifact in in_bucket.artifacts:
        assert store.verify(artifact.kind, artifact.name) == []

    again = graph.run(overrides=SHORT)
    assert again.success, again.log
    assert len(again.reused - {"champion_adapter"}) == 7

    secrets = [ceph_server.SECRET_KEY, ceph_server.ACCESS_KEY, TOKEN]
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written |= {Path(key): ceph.get(key) for key in ceph.listed()}
    assert any(b"lora_adapter" in content for path, content in written.items() if "dagster_home" in str(path))
    for secret in secrets:
        assert [path for path, content in written.items() if secret.encode() in content] == []
        assert secret not in in_folder.log + on_s3.stdout + again.log


def test_data_and_model_are_found_again_in_a_bucket(
    graph: Graph, ceph: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_STORE", ceph.url)
    made = graph.run("*tokenized_dataset")
    assert made.success, made.log
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "another"))
    assert graph.run("*tokenized_dataset").reused == {"dolly_raw", "cached_base_model", "tokenized_dataset"}
    store = open_store(ceph.url, "tests", tmp_path / "fresh")
    for artifact in (found := inventory(store.objects).artifacts):
        assert store.verify(artifact.kind, artifact.name) == []
    assert sorted(artifact.kind for artifact in found) == ["base-models", "raw", "tokenized"]


def test_wrong_credentials_fail_the_run_with_one_clear_error(
    graph: Graph, ceph: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_STORE", ceph.url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-that-nobody-may-see")
    run = graph.run("dolly_raw", partition=None)
    assert run.failures.keys() == {"dolly_raw"}
    assert "AWS_SECRET_ACCESS_KEY" in run.failures["dolly_raw"]
    assert "wrong-secret-that-nobody-may-see" not in run.log


def test_worker_never_asks_the_hub(tmp_path: Path) -> None:
    """What a worker runs before anything else."""
    asserts = "from finetune_assets.worker.process import forbid_hub; forbid_hub()\n"
    asserts += "from huggingface_hub import constants; assert constants.HF_HUB_OFFLINE\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", asserts], env=environment, check=True)
    too_late = subprocess.run(
        [sys.executable, "-c", f"import huggingface_hub.constants\n{asserts}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert too_late.returncode == 1
    assert "a worker must not contact the Hub" in too_late.stderr
