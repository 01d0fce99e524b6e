"""The whole graph through Dagster's command line: from rows to an adapter, and what re-runs when."""

import json
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import torch
from integration.cli import materialize, reused
from paths import ROOT
from peft import PeftModel
from projects import TestProject
from servers import wandb as wandb_server
from servers.wandb import KEY
from transformers import AutoModelForCausalLM

import finetune_assets.sample
from finetune_assets.resources.project import Project

SHORT = ["training.max_steps=2", "evaluation.generated_rows=4"]
EVERYTHING = {"dolly_raw", "cached_base_model", "tokenized_dataset", "training_plan", "lora_adapter"}
EVERYTHING |= {"adapter_evaluation", "experiment_report"}


def test_what_re_runs_when(project: TestProject) -> None:
    """One story in one store: first run, second run, and one changed thing at a time."""
    first = materialize(overrides=SHORT)
    assert first.returncode == 0, first.stdout
    assert reused(first) == set()
    assert "step 2/2 · loss" in first.stdout
    assert "grad_norm" in first.stdout
    assert "tokens/s" in first.stdout
    assert "ETA" in first.stdout
    (page,) = project.published("reports")
    told = json.loads((project.store.fetch(project.store.resolve("reports", page, "it")) / "report.json").read_text())
    assert told["experiments"][0]["runs"][0]["fingerprint"] == project.published("adapters")[0]
    assert told["experiments"][0]["runs"][0]["numbers"].keys() >= {"loss_challenger", "tokens_per_second"}

    demo = project.configs / "experiments" / "demo.yaml"
    lines = [line for line in demo.read_text().splitlines() if not line.startswith("#")]
    head, _, lora_and_after = "\n".join(lines).partition("\nlora:")
    demo.write_text("# another comment and order\nlora:" + lora_and_after + "\n" + head + "\n")
    again = materialize(overrides=SHORT)
    assert again.returncode == 0
    assert reused(again) == EVERYTHING
    assert "tokens/s" not in again.stdout

    slower = materialize(overrides=[*SHORT, "training.learning_rate=5e-4"])
    assert slower.returncode == 0
    assert reused(slower) == EVERYTHING - {"training_plan", "lora_adapter", "adapter_evaluation", "experiment_report"}

    shorter = materialize(overrides=[*SHORT, "data.tokenization.cutoff_len=100"])
    assert shorter.returncode == 0
    assert reused(shorter) == {"dolly_raw", "cached_base_model"}

    forced = materialize("lora_adapter", overrides=SHORT, force=True)
    assert forced.returncode == 0
    assert reused(forced) == set()
    assert not project.leftovers_of_builds()

    without_overrides = materialize("adapter_evaluation")
    assert without_overrides.returncode == 1, "an adapter of an override run leaked into the next"
    assert "materialize lora_adapter first" in without_overrides.stdout


def test_assets_one_by_one_on_an_empty_instance(
    project: TestProject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each asset in a process and on a Dagster instance of its own finds what its configuration demands.

    wandb, which no setting asks for, is imported by none of their processes.
    """
    (tmp_path / "traps").mkdir()
    imported = tmp_path / "wandb_was_imported"
    (tmp_path / "traps" / "wandb.py").write_text(f"open({str(imported)!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'traps'}:{os.environ.get('PYTHONPATH', '')}")
    for i, asset in enumerate(["dolly_raw", "cached_base_model", "tokenized_dataset", "lora_adapter"]):
        home = tmp_path / f"home{i}"
        home.mkdir()
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        run = materialize(asset, None if asset == "dolly_raw" else "demo", SHORT if i else [])
        assert run.returncode == 0, run.stdout
    assert len(project.published("adapters")) == 1
    assert not imported.exists()


def test_asset_whose_input_was_not_made_says_which(project: TestProject) -> None:
    run = materialize("tokenized_dataset")
    assert run.returncode == 1
    assert "materialize dolly_raw first" in run.stdout or "materialize cached_base_model first" in run.stdout


@pytest.mark.soak
def test_two_processes_give_the_adapter_of_one(project: TestProject) -> None:
    """The same global batch from one and from two torchrun processes."""
    from safetensors.torch import load_file

    adapters = []
    for processes in ("1", "2"):
        overrides = [*SHORT, f"training.processes_per_node={processes}", "training.micro_batch_size=2"]
        run = materialize("*lora_adapter", overrides=overrides, force=True)
        assert run.returncode == 0, run.stdout
        assert f"on {processes} x cpu" in run.stdout
        (name,) = project.published("adapters")
        folder = project.store.fetch(project.store.resolve("adapters", name, "lora_adapter"))
        adapters.append(load_file(folder / "adapter_model.safetensors"))
    one, two = adapters
    # Two steps of Adam turn rounding differences of near-zero gradients into differences of about the learning rate
    difference = torch.cat([(one[name] - two[name]).flatten() for name in one])
    moved = torch.cat([value.flatten() for value in one.values()])
    assert difference.norm() / moved.norm() < 1e-3


@pytest.mark.soak
def test_own_folder_of_rows_and_model(project: TestProject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The README's way to own data, own model and an own experiment; loaded by PEFT with nothing of ours."""
    package = Path(finetune_assets.sample.__file__).parent
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = (package / "dolly_sample.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (rows / "a.jsonl").write_text("".join(lines[:200]), encoding="utf-8")
    (rows / "b.jsonl").write_text("".join(lines[200:300]), encoding="utf-8")
    subprocess.run(["cp", "-r", str(package / "base_model"), str(tmp_path / "my_model")], check=True)
    monkeypatch.setenv("FINETUNE_RAW_DATA", "./rows")
    project.write_experiment("mine", "model: {base_model: ./my_model}\ntraining: {max_steps: 2, macro_batch_size: 8}")
    run = materialize(partition="mine")
    assert run.returncode == 0, run.stdout
    (name,) = project.published("adapters")
    folder = project.store.fetch(project.store.resolve("adapters", name, "lora_adapter"))
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["base_model"] == "local/my_model"
    assert [provenance[key] for key in ("dolly_raw", "tokenized_dataset")] == [
        project.published("raw")[0],
        project.published("tokenized")[0],
    ]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "my_model")
    assert PeftModel.from_pretrained(base, folder).peft_config["default"].r == 16


def test_warm_start_from_the_store_and_from_a_folder(project: TestProject) -> None:
    assert materialize("*lora_adapter", overrides=SHORT).returncode == 0
    (first,) = project.published("adapters")
    run = materialize("lora_adapter", overrides=[*SHORT, f"training.warm_start={first}"])
    assert run.returncode == 0, run.stdout
    assert len(project.published("adapters")) == 2
    folder = project.store.fetch(project.store.resolve("adapters", first, "lora_adapter"))
    begun = Project(overrides=[f"training.warm_start={folder}"]).lineage("demo").warm_start()
    assert begun
    imported = {path.name: path.read_bytes() for path in project.store.fetch(begun).iterdir() if path.is_file()}
    assert imported == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    missing = materialize("lora_adapter", overrides=[*SHORT, "training.warm_start=./gone"])
    assert missing.returncode == 1
    assert "training.warm_start" in missing.stdout


def test_wandb_run_is_linked_and_its_key_is_nowhere(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online: the asset's metadata name run and artifact, also when the store has the adapter already."""
    asset = dg.AssetKey("lora_adapter")
    with wandb_server.running() as server:
        for name, value in {"API_KEY": KEY, "BASE_URL": server.url, "ERROR_REPORTING": "false"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.setenv("HOME", str(project.root / "home"))
        overrides = [*SHORT, "wandb.project=p", "wandb.log_model=true"]
        runs = [materialize("*lora_adapter", overrides=overrides), materialize("lora_adapter", overrides=overrides)]
        assert [run.returncode for run in runs] == [0, 0], runs[0].stdout
        assert "lora_adapter" in reused(runs[1])
        (ours,) = server.runs.values()
        with dg.DagsterInstance.get() as instance:
            last = instance.get_latest_materialization_event(asset)
        assert last
        assert last.asset_materialization
        metadata = last.asset_materialization.metadata
        assert metadata["wandb_run"] == dg.MetadataValue.url(f"{server.url}/someone/p/runs/{ours.name}")
        assert metadata["wandb_artifact"].value == f"someone/p/adapter-{ours.name}:latest"
        used = {server.artifacts[one].name for one in ours.used}
        assert f"dataset-{project.published('tokenized')[0][:32]}" in used
        assert list((project.cache / "wandb").glob(f"run-*-{ours.name}"))
    written = [path for path in project.root.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in runs[0].stdout


def test_workspace_loads_and_definitions_validate() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
