"""The whole graph: from rows to an adapter, and what re-runs when."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import torch
import yaml
from integration.graph import Graph
from peft import PeftModel
from processes import AGENT, JOB, RANK, SERVER
from projects import SHORT, TestProject
from safetensors.torch import load_file
from servers import wandb as wandb_server
from servers.wandb import KEY
from transformers import AutoModelForCausalLM

from finetune_assets.resources.project import Project
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE

EVERYTHING = {"dolly_raw", "cached_base_model", "tokenized_dataset", "training_plan", "lora_adapter"}
EVERYTHING |= {"adapter_evaluation", "experiment_report"}


def test_the_demo_runs_the_whole_graph_from_the_command_line(
    project: TestProject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`make demo`, shortened, with two ranks below a fork server of the run's own, and progress in its output.

    wandb, which no setting asks for, is imported by none of its processes. Of a first run, only workers import torch
    and transformers, and of a second run no process does.
    """
    interpreters, wandb_was_imported = tmp_path / "interpreters", tmp_path / "wandb_was_imported"
    (tmp_path / "traps").mkdir()
    (tmp_path / "traps" / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        f"with open({str(interpreters)!r}, 'a') as file: print(*sys.orig_argv, file=file)\n"
        "heavy = lambda: {'torch', 'transformers', 'matplotlib', 'pandas'} & {*sys.modules}\n"
        f"atexit.register(lambda: print(sys.argv[1:], heavy(), file=open({str(tmp_path / 'loaded')!r}, 'a')))\n"
    )
    (tmp_path / "traps" / "wandb.py").write_text(f"open({str(wandb_was_imported)!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "traps"))
    demo = project.configs / "experiments" / "demo.yaml"
    settings = yaml.safe_load(demo.read_text())
    settings["training"] |= {"max_steps": 2, "processes_per_node": 2, "micro_batch_size": 2}
    settings["evaluation"] |= {"generated_rows": 4, "general_tokens": 500}
    demo.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "finetune_assets.cli", "demo"]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert run.returncode == 0, run.stdout
    for word in ("step 2/2 ", "grad_norm", "tokens/s", "ETA", "2 x cpu"):
        assert word in run.stdout
    assert not wandb_was_imported.exists()
    assert project.published("adapters") == [], "the demo has a namespace of its own"
    project = TestProject(project.root, "tests-demo")
    (page,) = project.published("reports")
    (adapter,) = project.published("adapters")
    report = project.store.fetch(project.store.resolve("reports", page, "experiment_report")) / "report.json"
    (trained,) = json.loads(report.read_text())["experiments"][0]["runs"]
    assert trained["fingerprint"] == adapter
    assert adapter in run.stdout.replace("\n", ""), "where it lies"
    assert trained["numbers"].keys() >= {"loss_challenger", "tokens_per_second"}
    assert not project.leftovers_of_builds()
    workers = (SERVER, JOB, AGENT, RANK, "-m finetune_assets.evaluation", "-m finetune_assets.preflight")
    started = [word for line in interpreters.read_text().splitlines() for word in workers if word in line]
    assert started == [SERVER], "all workers are forked from one interpreter"

    loaded = (tmp_path / "loaded").read_text().splitlines()
    assert len([line for line in loaded if "torch" in line]) == len(started), loaded
    (tmp_path / "loaded").unlink()
    monkeypatch.setenv("FINETUNE_FORKSERVER", "off")
    again = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert again.returncode == 0, again.stdout
    assert project.published("adapters") == [adapter]
    assert {line.rpartition("] ")[2] for line in (tmp_path / "loaded").read_text().splitlines()} == {"set()"}


def test_what_re_runs_when(project: TestProject, graph: Graph) -> None:
    """One story in one store: first run, second run, and one changed thing at a time."""
    first = graph.run(overrides=SHORT)
    assert first.success, first.log
    assert first.materialized >= EVERYTHING
    assert first.reused == set()

    demo = project.configs / "experiments" / "demo.yaml"
    lines = [line for line in demo.read_text().splitlines() if not line.startswith("#")]
    head, _, lora_and_after = "\n".join(lines).partition("\nlora:")
    demo.write_text("# another comment and order\nlora:" + lora_and_after + "\n" + head + "\n")
    again = graph.run(overrides=SHORT)
    assert again.success, again.log
    assert again.reused >= EVERYTHING
    assert len(project.published("adapters")) == 1

    slower = graph.run(overrides=[*SHORT, "training.learning_rate=5e-4"])
    assert slower.success, slower.log
    assert EVERYTHING - slower.reused == {"training_plan", "lora_adapter", "adapter_evaluation", "experiment_report"}

    shorter = graph.run("*training_plan", overrides=[*SHORT, "data.tokenization.cutoff_len=100"])
    assert shorter.success, shorter.log
    assert shorter.reused == {"dolly_raw", "cached_base_model"}

    forced = graph.run("lora_adapter", overrides=SHORT, force=True)
    assert forced.success, forced.log
    assert forced.reused == set()
    assert not project.leftovers_of_builds()

    without_overrides = graph.run("adapter_evaluation")
    assert without_overrides.failures.keys() == {"adapter_evaluation"}, "an adapter of an override run leaked"
    assert "lora_adapter" in without_overrides.failures["adapter_evaluation"]


def test_assets_one_by_one_on_an_empty_instance(project: TestProject) -> None:
    """Each asset on a Dagster instance of its own finds what its configuration demands."""
    for asset in ("dolly_raw", "cached_base_model", "tokenized_dataset", "lora_adapter"):
        alone = None if asset == "dolly_raw" else "demo"
        run = Graph().run(asset, alone, SHORT)
        assert run.success, run.log
    assert len(project.published("adapters")) == 1


def test_asset_whose_input_was_not_made_says_which(graph: Graph) -> None:
    run = graph.run("tokenized_dataset")
    assert run.failures.keys() == {"tokenized_dataset"}
    assert any(asset in run.failures["tokenized_dataset"] for asset in ("dolly_raw", "cached_base_model"))


@pytest.mark.soak
@pytest.mark.system
def test_two_processes_give_the_adapter_of_one(project: TestProject, graph: Graph) -> None:
    """The same global batch from one and from two torchrun processes."""
    adapters = []
    for processes, select in ((1, "*lora_adapter"), (2, "lora_adapter")):
        overrides = [*SHORT, f"training.processes_per_node={processes}", "training.micro_batch_size=2"]
        run = graph.run(select, overrides=overrides, force=True)
        assert run.success, run.log
        (name,) = project.published("adapters")
        folder = project.store.fetch(project.store.resolve("adapters", name, "lora_adapter"))
        adapters.append(load_file(folder / "adapter_model.safetensors"))
    one, two = adapters
    # Two steps of Adam turn rounding differences of near-zero gradients into differences of about the learning rate
    difference = torch.cat([(one[name] - two[name]).flatten() for name in one])
    moved = torch.cat([value.flatten() for value in one.values()])
    assert difference.norm() / moved.norm() < 1e-3


@pytest.mark.soak
@pytest.mark.system
def test_own_folder_of_rows_and_model(
    project: TestProject, graph: Graph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The README's way to own data, own model and an own experiment; loaded by PEFT with nothing of ours."""
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)
    (rows / "a.jsonl").write_text("".join(lines[:200]), encoding="utf-8")
    (rows / "b.jsonl").write_text("".join(lines[200:300]), encoding="utf-8")
    shutil.copytree(PACKAGED["demo-base"], tmp_path / "my_model")
    monkeypatch.setenv("FINETUNE_RAW_DATA", "./rows")
    project.write_experiment("mine", "model: {base_model: ./my_model}\ntraining: {macro_batch_size: 8}")
    run = graph.run(partition="mine", overrides=SHORT)
    assert run.success, run.log
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


@pytest.mark.system
def test_warm_start_from_the_store_and_from_a_folder(project: TestProject, graph: Graph) -> None:
    first_run = graph.run("*lora_adapter", overrides=SHORT)
    assert first_run.success, first_run.log
    (first,) = project.published("adapters")
    run = graph.run("lora_adapter", overrides=[*SHORT, f"training.warm_start={first}"])
    assert run.success, run.log
    assert len(project.published("adapters")) == 2
    folder = project.store.fetch(project.store.resolve("adapters", first, "lora_adapter"))
    begun = Project(overrides=[f"training.warm_start={folder}"]).lineage("demo").import_external_inputs()["warm_start"]
    imported = {path.name: path.read_bytes() for path in project.store.fetch(begun).iterdir() if path.is_file()}
    assert imported == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    missing = graph.run("lora_adapter", overrides=[*SHORT, "training.warm_start=./gone"])
    assert not missing.success
    assert "training.warm_start" in missing.failures["lora_adapter"]


@pytest.mark.system
def test_wandb_run_is_linked_and_its_key_is_nowhere(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online: the asset's metadata name run and artifact, also when the store has the adapter already."""
    with wandb_server.running() as server, dg.DagsterInstance.get() as instance:
        for name, value in {"API_KEY": KEY, "BASE_URL": server.url, "ERROR_REPORTING": "false"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.setenv("HOME", str(project.root / "home"))
        overrides, graph = [*SHORT, "wandb.project=p", "wandb.log_model=true"], Graph(instance)
        first, second = (graph.run(select, overrides=overrides) for select in ("*lora_adapter", "lora_adapter"))
        assert first.success, first.log
        assert second.reused == {"lora_adapter"}
        (ours,) = server.runs.values()
        metadata = second.metadata("lora_adapter")
        assert metadata["wandb_run"] == f"{server.url}/someone/p/runs/{ours.name}"
        assert metadata["wandb_artifact"] == f"someone/p/adapter-{ours.name}:latest"
        used = {server.artifacts[one].name for one in ours.used}
        assert f"dataset-{project.published('tokenized')[0][:32]}" in used
        assert list((project.cache / "wandb").glob(f"run-*-{ours.name}"))
    written = [path for path in project.root.rglob("*") if path.is_file()]
    assert any(b"lora_adapter" in path.read_bytes() for path in written if "dagster_home" in str(path))
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in first.log + second.log
