"""Rows and base model from a Hub, through the whole graph, by the command line."""

import json
import shutil
from pathlib import Path

import pytest
from integration.cli import materialize, reused
from projects import TestProject
from servers.hub import TOKEN, Hub

from finetune_assets.data.sources import SAMPLE
from finetune_assets.store.base_models import PACKAGED

SHORT = ["training.max_steps=2", "evaluation.generated_rows=4"]


def test_gated_model_and_dataset_become_an_adapter_that_names_their_commits(
    project: TestProject, monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path
) -> None:
    """And what is pinned to commits and lies in the store needs no Hub the next time."""
    model = hub.add("owner/model", {p.name: p.read_bytes() for p in PACKAGED["demo-base"].iterdir()}, gated=True)
    rows = hub.add("datasets/owner/rows", {"train.jsonl": SAMPLE.read_bytes()}, gated=True)
    monkeypatch.setenv("FINETUNE_RAW_DATA", "hf://datasets/owner/rows")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    demo = project.configs / "experiments" / "demo.yaml"
    demo.write_text(demo.read_text().replace("base_model: demo-base", "base_model: owner/model"))
    first = materialize(overrides=SHORT)
    assert first.returncode == 0, first.stdout

    (name,) = project.published("adapters")
    adapter = project.store.fetch(project.store.resolve("adapters", name, "lora_adapter"))
    provenance = json.loads((adapter / "provenance.json").read_text())
    assert (provenance["base_model"], provenance["revision"]) == ("owner/model", model)
    raw = project.store.manifest("raw", project.published("raw")[0])
    assert raw is not None
    assert raw.made_from["content"] == {"repo": "owner/rows", "commit": rows, "subset": None, "split": "train"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in first.stdout

    hub.failing = 500
    shutil.rmtree(tmp_path / "hub_home")
    monkeypatch.setenv("FINETUNE_RAW_DATA", f"hf://datasets/owner/rows@{rows}")
    again = materialize(overrides=[*SHORT, f"model.revision={model}"])
    assert again.returncode == 0, again.stdout
    assert len(reused(again)) == 5
