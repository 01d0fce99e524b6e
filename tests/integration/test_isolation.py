"""Two people and production work on one bucket at once: base models are shared, nothing else is touched."""

import subprocess
import sys
from pathlib import Path

import pytest
from integration.cli import environment, materialize_command, run_at_once
from projects import SHORT, TestProject
from servers.proxy import Proxy
from servers.s3 import Bucket

PEOPLE = ("alice", "bob", "production")
PREFIX = "some/prefix"


@pytest.fixture
def environments(
    project: TestProject, ceph: Bucket, proxied: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, str]]:
    """Each on a machine of their own."""
    monkeypatch.setenv("FINETUNE_STORE", ceph.url)
    found = {}
    for name in PEOPLE:
        home = tmp_path / name / "dagster_home"
        home.mkdir(parents=True)
        (home / "dagster.yaml").write_bytes((tmp_path / "dagster_home" / "dagster.yaml").read_bytes())
        own = {"FINETUNE_NAMESPACE": name, "FINETUNE_CACHE": str(tmp_path / name), "DAGSTER_HOME": str(home)}
        found[name] = {**environment(), **own}
    return found


def owned(ceph: Bucket, name: str) -> dict[str, bytes]:
    """Everything below one name, by key."""
    return {key: ceph.get(key) for key in ceph.listed() if key.startswith(f"{PREFIX}/{name}/")}


@pytest.mark.soak
@pytest.mark.minutes
@pytest.mark.system
def test_each_has_their_own_and_all_share_the_base_model(
    environments: dict[str, dict[str, str]], ceph: Bucket, proxied: Proxy
) -> None:
    command = materialize_command("*", overrides=SHORT)
    run_at_once(command, [environments["production"]])
    of_production, shared = owned(ceph, "production"), owned(ceph, "base-models")
    assert {key.split("/")[3] for key in of_production} >= {"raw", "tokenized", "adapters", "evaluations"}
    uploads = proxied.count(r"^(PUT|POST) .*base-models")

    run_at_once(command, [environments["alice"], environments["bob"]])
    trained = {key.split("/")[2] for key in ceph.listed() if "/adapters/" in key and key.endswith("manifest.json")}
    assert trained == set(PEOPLE), "each for themselves"
    assert proxied.count(r"^(PUT|POST) .*base-models") == uploads
    assert {key.split("/")[2] for key in ceph.listed()} == {*PEOPLE, "base-models"}

    collect = [sys.executable, "-m", "finetune_assets.cli", "store", "gc", "--older-than", "0", "--delete"]
    of_bob = owned(ceph, "bob")
    subprocess.run(collect, env=environments["alice"], check=True, capture_output=True)
    assert (owned(ceph, "bob"), owned(ceph, "production"), owned(ceph, "base-models")) == (
        of_bob,
        of_production,
        shared,
    )
