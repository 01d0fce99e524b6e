"""Rows and base model from a Hub, through the whole graph."""

import json
import shutil
from pathlib import Path

import pytest
from integration.graph import Graph
from projects import SHORT, TestProject
from servers.hub import TOKEN, Hub

from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE


@pytest.mark.system
def test_gated_model_and_dataset_become_an_adapter_that_names_their_commits(
    project: TestProject, graph: Graph, monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path
) -> None:
    """And what is pinned to commits and lies in the store needs no Hub the next time."""
    model = hub.add("owner/model", {p.name: p.read_bytes() for p in PACKAGED["demo-base"].iterdir()}, gated=True)
    rows = hub.add("datasets/owner/rows", {"train.jsonl": SAMPLE.read_bytes()}, gated=True)
    monkeypatch.setenv("FINETUNE_RAW_DATA", "hf://datasets/owner/rows")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    demo = project.configs / "experiments" / "demo.yaml"
    demo.write_text(demo.read_text().replace("base_model: demo-base", "base_model: owner/model"))
    first = graph.run(overrides=SHORT)
    assert first.success, first.log

    (name,) = project.published("adapters")
    adapter = project.store.fetch(project.store.resolve("adapters", name, "lora_adapter"))
    provenance = json.loads((adapter / "provenance.json").read_text())
    assert (provenance["base_model"], provenance["revision"]) == ("owner/model", model)
    raw = project.store.manifest("raw", project.published("raw")[0])
    assert raw is not None
    assert raw.made_from["content"] == {"repo": "owner/rows", "commit": rows, "subset": None, "split": "train"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in first.log

    asked = [request for request in hub.requests if "/revision/main" in request]
    assert len(asked) == 2, "each branch was asked for once, by the asset that brings it"
    hub.failing = 500
    shutil.rmtree(tmp_path / "hub_home")
    again = graph.run(overrides=SHORT)
    assert again.success, again.log
    assert len(again.reused - {"champion_adapter"}) == 7
    assert f"owner/model@{model}" in again.log, "it names the commit that it takes, as it cannot ask"


def test_moved_branch_makes_a_new_artifact_beside_the_old(project: TestProject, graph: Graph, hub: Hub) -> None:
    files = {p.name: p.read_bytes() for p in PACKAGED["demo-base"].iterdir()}
    old = hub.add("owner/model", files)
    demo = project.configs / "experiments" / "demo.yaml"
    demo.write_text(demo.read_text().replace("base_model: demo-base", "base_model: owner/model"))
    assert graph.run("cached_base_model").success
    new = hub.add("owner/model", {**files, "generation_config.json": b"{}"})
    raw = graph.run(["dolly_raw", "tokenized_dataset"])
    assert raw.success, raw.log
    dataset = project.store.manifest("tokenized", project.published("tokenized")[0])
    model = project.store.manifest("base-models", f"owner/model/{old}")
    assert dataset
    assert model
    assert dataset.made_from["cached_base_model"] == model.fingerprint, "it goes on with what it began with"
    assert graph.run("cached_base_model").success
    for commit in (old, new):
        assert project.store.verify("base-models", f"owner/model/{commit}") == []
    pinned = project.store.objects.get("tests/pins/models/owner/model/main.json")
    assert json.loads(pinned)["commit"] == new


def test_what_was_never_asked_for_is_told(project: TestProject, graph: Graph, hub: Hub) -> None:
    demo = project.configs / "experiments" / "demo.yaml"
    demo.write_text(demo.read_text().replace("base_model: demo-base", "base_model: owner/model"))
    assert graph.run("dolly_raw", partition=None).success
    run = graph.run("tokenized_dataset")
    assert run.failures.keys() == {"tokenized_dataset"}
    assert all(word in run.failures["tokenized_dataset"] for word in ("cached_base_model", "owner/model@main"))
    assert hub.requests == []
