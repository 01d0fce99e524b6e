"""`finetune-plan` as a person types it, and on a model that nobody could load here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from projects import TestProject

from finetune_assets.config.loading import load_experiment
from finetune_assets.errors import UserError
from finetune_assets.launch.gpus import visible
from finetune_assets.preflight.device import Device, device_of
from finetune_assets.preflight.plan import make_plan
from finetune_assets.preflight.speed import Past
from finetune_assets.store.base_models import PACKAGED

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


def plan(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, which also says how much memory it took."""
    code = (
        "import atexit, sys; from finetune_assets.resident import peak_resident_mib\n"
        "atexit.register(lambda: print('took', peak_resident_mib(), file=sys.stderr))\n"
        f"from finetune_assets.tools.plan import main; main({list(arguments)!r})"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_demo_fits(project: TestProject) -> None:
    ran = plan("demo")
    assert ran.returncode == 0, ran.stderr
    for told in ("weights", "activations", "peak", "it fits", "not known: steps and tokens are known once"):
        assert told in ran.stdout


def test_a_model_of_70_billion_is_planned_without_its_weights(project: TestProject, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    hardware = "hardware: {gpu: H100}\ndata: {tokenization: {cutoff_len: 2048}}\n"
    project.write_experiment("big", f"model: {{base_model: {tmp_path}}}\n{hardware}")
    whole = plan("big", "--json")
    assert whole.returncode == 1, "131 GiB of weights on 79"
    found = json.loads(whole.stdout)
    assert not found["fits"]
    assert any("model.quantization=nf4" in way for way in found["advice"])
    assert found["memory_mib"]["weights"] == pytest.approx(70.55e9 * 2 / 2**20, rel=0.001)

    smaller = plan("big", "model.quantization=nf4", "--json")
    assert smaller.returncode == 0, smaller.stderr
    assert json.loads(smaller.stdout)["fits"]
    assert float(smaller.stderr.rpartition("took ")[2].split()[0]) < 1_024


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
    with pytest.raises(UserError, match=r"launcher\.gpus_per_node: 8, .* hardware\.gpu"):
        planned_device(project, "launcher={engine: slurm, gpus_per_node: 8}")


def test_an_unknown_experiment_is_told(project: TestProject) -> None:
    ran = plan("dmo")
    assert ran.returncode == 1
    assert "did you mean 'demo'" in ran.stderr


def state(seconds: float, **active: Any) -> dict[str, Any]:
    facts = {"hardware": "NVIDIA H100 80GB", "quantization": "none", "precision": "bf16", "processes": 1}
    facts |= {"gradient_checkpointing": False, "multiplied_weights": 1_000_000}
    return {"seconds": seconds, "tokens": 1_000_000, "active": {**facts, **active}}


def test_hours_follow_from_earlier_trainings_on_the_same_hardware(project: TestProject) -> None:
    from transformers import AutoConfig

    overrides = ["hardware.gpu=H100", "hardware.price_per_hour=3", "training.precision=bf16", "training.max_steps=7"]
    config = load_experiment(project.configs, "demo", overrides).config
    shape = AutoConfig.from_pretrained(PACKAGED["demo-base"])
    assert make_plan(shape, config).hours is None, "without rows nobody knows"
    dataset = tokenized(project, config)

    def hours(*states: dict[str, Any]) -> float:
        found = make_plan(shape, config, dataset, states).hours
        assert found
        return found

    guessed = make_plan(shape, config, dataset)
    assert "data sheet" in guessed.known_from
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
    from finetune_assets.data.sources import SAMPLE
    from finetune_assets.data.tokenization import load_tokenizer

    dataset = project.root / "dataset"
    dataset.mkdir()
    rows = ingest(project.root / "raw", SAMPLE)
    prepare_dataset(rows, load_tokenizer(str(PACKAGED["demo-base"])), config.data, "salt", dataset)
    return dataset
