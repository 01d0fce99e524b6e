"""`finetune plan` as a person types it, and on a model that nobody could load here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import run
from projects import TestProject

from finetune_assets.config.loading import load_experiment
from finetune_assets.errors import UserError
from finetune_assets.preflight.case import Shape
from finetune_assets.preflight.device import Device, device_of
from finetune_assets.preflight.plan import make_plan
from finetune_assets.preflight.speed import Past
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.store.results import Results
from finetune_assets.worker.gpus import visible

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "dtype": "bfloat16",
}


LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "dagster")
HARDWARE = "hardware: {gpu: H100}\ndata: {tokenization: {cutoff_len: 2048}}\n"


def plan(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, which also says how many MiB it took, and what it imported."""
    code = (
        "import atexit, json, sys; from finetune_assets.training.process_memory import peak_resident_mib\n"
        f"imported = lambda: [name for name in {LIBRARIES} if name in sys.modules]\n"
        "atexit.register(lambda: print(json.dumps([peak_resident_mib(), imported()]), file=sys.stderr))\n"
        f"from finetune_assets.cli.main import finetune; finetune({['plan', *arguments]!r})"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def took(ran: "subprocess.CompletedProcess[str]") -> tuple[float, list[str]]:
    mib, imported = json.loads(ran.stderr.splitlines()[-1])
    return mib, imported


def test_the_demo_is_shown_by_part(project: TestProject, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "plan", "demo")
    assert code == 0
    rows = {line.split()[0] for line in printed.splitlines() if line.strip()}
    assert rows >= {"weights", "activations", "peak", "usable"}
    assert not {"steps", "tokens"} & rows, "there is no tokenized dataset yet"


@pytest.mark.system
def test_what_a_server_cannot_serve_is_shown_and_fails_where_there_are_servers(
    project: TestProject, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write_experiment("dora", "model: {base_model: demo-base}\nlora: {use_dora: true}\n")
    code, printed, _ = run(capsys, "plan", "dora")
    assert code == 0
    assert "lora.use_dora" in printed
    project.write_experiment(
        "dora",
        "model: {base_model: demo-base}\nlora: {use_dora: true}\nserving: {servers: ['folder:./served']}\n",
    )
    code, printed, _ = run(capsys, "plan", "dora", "--json")
    assert code == 1
    found = json.loads(printed)
    assert found["fits"]
    (problem,) = found["not_servable"]
    assert "lora.use_dora" in problem


@pytest.mark.soak
@pytest.mark.system
def test_a_model_of_70_billion_is_planned_without_its_weights_and_the_second_time_without_torch(
    project: TestProject, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    project.write_experiment("big", f"model: {{base_model: {tmp_path}}}\n{HARDWARE}")
    smaller = plan("big", "--set", "model.quantization=nf4", "--json")
    assert smaller.returncode == 0, smaller.stderr
    found = json.loads(smaller.stdout)
    assert found["fits"]
    linear = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672)
    others = 2 * 2 * 128_256 * 8192  # embedding and output layer, in 16 bits
    assert found["memory_mib"]["weights"] == pytest.approx((linear * 0.5159 + others) / 2**20, rel=0.005)
    mib, imported = took(smaller)
    assert mib < 1_024
    assert imported == ["torch", "transformers", "peft"]

    again = plan("big", "--set", "model.quantization=nf4", "--json")
    assert json.loads(again.stdout) == found
    assert took(again)[1] == []


@pytest.mark.soak
@pytest.mark.system  # one more simulation for each setting that would fit
def test_what_a_model_of_70_billion_would_fit_with_is_advised(project: TestProject, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    project.write_experiment("big", f"model: {{base_model: {tmp_path}}}\n{HARDWARE}")
    whole = plan("big", "--json")
    assert whole.returncode == 1, "131 GiB of weights on 79"
    found = json.loads(whole.stdout)
    assert not found["fits"]
    assert any("model.quantization=nf4" in way for way in found["advice"])
    assert found["memory_mib"]["weights"] == pytest.approx(70.55e9 * 2 / 2**20, rel=0.001)


def planned_device(project: TestProject, *overrides: str) -> Device:
    return device_of(load_experiment(project.configs, "demo", list(overrides)).config)


def test_machines_of_a_cluster_are_planned_for(project: TestProject) -> None:
    here = planned_device(project)
    two = planned_device(project, "launcher={engine: slurm, nodes: 2}", "training.processes_per_node=2")
    assert (two.processes, two.nodes) == (4, 2)
    assert two.usable == here.usable // 2, "two share a machine's memory"
    gpus = planned_device(
        project, "launcher={engine: slurm, nodes: 2-4, gpus_per_node: 2}", "hardware={gpu: H100, count: 8}"
    )
    assert (gpus.kind, gpus.processes, gpus.nodes) == ("cuda", 4, 2), "as many as may begin"


@pytest.mark.skipif(visible() != [], reason="this machine has GPUs to plan for")
def test_gpus_of_a_cluster_have_to_be_named(project: TestProject) -> None:
    with pytest.raises(UserError, match=r"launcher\.gpus_per_node: 8\b.*hardware\.gpu"):
        planned_device(project, "launcher={engine: slurm, gpus_per_node: 8}")


def test_an_unknown_experiment_is_refused(project: TestProject, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", "dmo")
    assert code == 1
    assert "'dmo'" in err
    assert "'demo'" in err


def state(seconds: float, **active: Any) -> dict[str, Any]:
    facts = {"hardware": "NVIDIA H100 80GB", "quantization": "none", "precision": "bf16", "processes": 1}
    facts |= {"gradient_checkpointing": False, "multiplied_weights": 1_000_000}
    return {"seconds": seconds, "tokens": 1_000_000, "active": {**facts, **active}}


def test_hours_follow_from_earlier_trainings_on_the_same_hardware(project: TestProject) -> None:
    overrides = ["hardware.gpu=H100", "hardware.price_per_hour=3", "training.precision=bf16", "training.max_steps=7"]
    config = load_experiment(project.configs, "demo", overrides).config
    shape = Shape.read(PACKAGED["demo-base"], own_code=False, results=Results(project.root / "results"))
    assert make_plan(shape, config).hours is None, "without rows nobody knows"
    dataset = tokenized(project, config)

    def hours(*states: dict[str, Any]) -> float:
        found = make_plan(shape, config, dataset, states).hours
        assert found
        return found

    guessed = make_plan(shape, config, dataset)
    assert guessed.hours
    learned = make_plan(shape, config, dataset, [state(10.0)])
    assert learned.work
    assert learned.work.steps == 7
    assert learned.cost == pytest.approx(3 * learned.hours)  # type: ignore[operator]
    assert hours(state(20.0)) == pytest.approx(2 * hours(state(10.0)))
    alike = state(40.0, multiplied_weights=1_966_080)
    assert hours(state(10.0), alike, state(10.0)) == pytest.approx(hours(alike)), "one that is like it counts alone"
    assert hours(state(10.0, hardware="NVIDIA A100")) == guessed.hours
    assert Past.of({"seconds": 1.0, "tokens": 1, "active": {}}) is None, "an adapter of before this was kept"


def tokenized(project: TestProject, config: Any) -> Path:
    from raw import ingest

    from finetune_assets.data.prepare import prepare_dataset
    from finetune_assets.data.tokenization import load_tokenizer
    from finetune_assets.sources.local import SAMPLE

    dataset = project.root / "dataset"
    dataset.mkdir()
    rows = ingest(project.root / "raw", SAMPLE)
    prepare_dataset(rows, load_tokenizer(str(PACKAGED["demo-base"])), config.data, "salt", dataset)
    return dataset
