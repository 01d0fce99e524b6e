"""Trainings on judged answers: resumed to the bit after kill -9, in 16 bits and on quantized bases, and in memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from judgements import BASE, Rows, configured, labelled, pairs, prepared, sample_rows
from training.conftest import ALONE, MADE_FROM
from training.measuring import gradients, relative

from finetune_assets.config.loading import dump
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths

STEPS = (
    "training.max_steps=6",
    "training.macro_batch_size=4",
    "training.micro_batch_size=1",
    "training.logging_steps=1",
    "training.save_steps=2",
    "training.eval_steps=3",
    "lora.dropout=0.1",
)
FEW = [*pairs(8), *labelled(16)[8:], *sample_rows(40)[34:]]
ROWS = [*pairs(30), *labelled(60)[30:], *sample_rows(100)[80:]]


def ready(folder: Path, *overrides: str, rows: Rows = ROWS) -> LoraFinetune:
    """A training with its reference, before its first step."""
    config = configured(*overrides)
    run = in_process(folder, prepared(folder / "data", rows, config), config)
    assert run.objective
    run.objective.prepare_reference()
    return run


def in_process(folder: Path, dataset: Path, config: ExperimentConfig) -> LoraFinetune:
    (folder / "output").mkdir(parents=True, exist_ok=True)
    job = TrainingPaths(BASE, dataset, folder / "output", folder / "scratch", MADE_FROM)
    return LoraFinetune(job, config, ALONE, Reporter(print))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple["subprocess.Popen[bytes]", Path, Path]]:
    """Starts the worker of a training on the rows above; the process, its output and its scratch folder."""
    shared = tmp_path_factory.mktemp("judged")

    def start(objective: str, name: str, scratch: Path | None = None) -> tuple["subprocess.Popen[bytes]", Path, Path]:
        config = configured(f"training.objective={objective}", *STEPS)
        dataset = shared / objective / "dataset"
        if not dataset.exists():
            prepared(shared / objective, ROWS, config)
        folder = shared / f"{objective}-{name}"
        (folder / "output").mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(config))
        (folder / "made_from.json").write_text(json.dumps(MADE_FROM))
        scratch = scratch or folder / "scratch"
        arguments = {
            "config": folder / "config.yaml",
            "made-from": folder / "made_from.json",
            "base-model": BASE,
            "dataset": dataset,
            "output": folder / "output",
            "scratch": scratch,
        }
        command = [sys.executable, "-m", "finetune_assets.training"]
        command += [part for name, path in arguments.items() for part in (f"--{name}", str(path))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        return process, folder / "output", scratch

    return start


@pytest.mark.soak
@pytest.mark.system
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_killed_training_resumes_to_the_bit(
    start: Callable[..., tuple["subprocess.Popen[bytes]", Path, Path]], objective: str
) -> None:
    """And its reference log-probabilities are those of the first attempt, not computed again."""
    undisturbed, expected, _ = start(objective, "undisturbed")
    assert undisturbed.wait(500) == 0
    victim, _, scratch = start(objective, "victim")
    while not [*scratch.glob("step-*")]:
        assert victim.poll() is None, "it ended before a checkpoint"
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    for later in sorted(scratch.glob("step-*"))[1:]:
        shutil.rmtree(later)
    reference = (scratch / "reference.arrow").read_bytes()
    changed = (scratch / "reference.arrow").stat().st_mtime_ns
    resumed, output, _ = start(objective, "resumed", scratch)
    assert resumed.wait(500) == 0
    assert (scratch / "reference.arrow").stat().st_mtime_ns == changed
    assert (output / "reference.arrow").read_bytes() == reference
    for name in ("adapter_model.safetensors", "reference.arrow"):
        assert (output / name).read_bytes() == (expected / name).read_bytes()
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (output, expected)]
    for name in ("held_out_loss", "held_out_preference"):
        assert states[0][name] == states[1][name]
    metrics = [entry for entry in states[1]["history"] if "preference_accuracy" in entry]
    assert metrics
    assert all(0 <= entry["preference_accuracy"] <= 1 for entry in metrics)


def test_training_on_pairs_prefers_the_chosen_answers(tmp_path: Path) -> None:
    """Of held-out pairs too, and learns the instruction rows beside them."""
    settings = ("training.max_steps=8", "training.learning_rate=0.005", "training.micro_batch_size=2")
    rows = [*pairs(40, "I would rather not say."), *sample_rows(100)[80:]]
    common = "training.objective=dpo", "training.macro_batch_size=8", "data.val_fraction=0.3"
    run = ready(tmp_path, *common, *settings, rows=rows)
    run.run()
    before, after = run.log.held_out_preference["before"], run.log.held_out_preference["after"]
    assert before["reward_margin"] == 0
    assert after["reward_margin"] > 0
    assert after["preference_accuracy"] > 0.7
    assert run.log.held_out_loss["after"] < run.log.held_out_loss["before"]  # type: ignore[operator]
    last = run.log.history[-1]
    assert {"loss", "reward_margin", "preference_accuracy", "grad_norm", "tokens_per_second"} <= last.keys()


@pytest.mark.system
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_every_way_to_compute_has_the_same_gradient(objective: str, tmp_path: Path) -> None:
    """Packed or not, with or without boundaries, in one or several micro-batches, with recomputed activations."""
    all_train = ("data.val_fraction=0", "data.gate_fraction=0", "data.tokenization.cutoff_len=80")
    common = (f"training.objective={objective}", "training.macro_batch_size=64", "training.max_grad_norm=0", *all_train)
    ways = {
        "packed": (),
        "alone": ("data.tokenization.packing=false",),
        "rows": ("data.tokenization.packing=false", "model.attention=sdpa", "training.micro_batch_size=3"),
        "packed rows": ("model.attention=eager",),
        "whole": ("training.micro_batch_size=64",),
        "checkpointing": ("training.gradient_checkpointing=true",),
    }
    expected = None
    for name, overrides in ways.items():
        run = ready(tmp_path / name, *common, *overrides, rows=FEW)
        gradient = gradients(run)
        expected = gradient if expected is None else expected
        assert relative(gradient, expected) < 1e-5, name


@pytest.mark.system
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (("training.precision=bf16", "model.dtype=bfloat16"), 0.1),
        (("model.quantization=int8",), 0.2),
        (("model.quantization=nf4",), 0.5),
    ],
)
def test_sixteen_bits_and_quantized_bases(overrides: tuple[str, ...], tolerance: float, tmp_path: Path) -> None:
    """The reference computes in the same types, so that no reward is there before the first step."""
    common = (
        "training.objective=dpo",
        "training.macro_batch_size=64",
        "training.max_grad_norm=0",
        "data.val_fraction=0",
    )
    whole = gradients(ready(tmp_path / "whole", *common, rows=FEW))
    run = ready(tmp_path / "other", *common, *overrides, rows=FEW)
    assert run.objective
    sums = _rewards(run)
    assert abs(float(sums[0] - sums[1])) < 0.05
    assert relative(gradients(run), whole) < tolerance


def _rewards(run: LoraFinetune) -> torch.Tensor:
    assert run.objective
    run.model.eval()
    for loss in run.objective.losses(run.work(0)):
        assert loss.isfinite()
    return run.objective.sums


def test_the_saved_activations_are_those_of_cross_entropy(tmp_path: Path) -> None:
    """Bytes that the forward pass keeps for each token, of the same rows as pairs and as instructions."""
    estimates = []
    for objective, rows in (("dpo", pairs(40)), ("sft", sample_rows(80))):
        config = configured(f"training.objective={objective}")
        run = in_process(tmp_path / objective, prepared(tmp_path / objective / "data", rows, config), config)
        assert run.estimate
        estimates.append(run.estimate.activations)
    assert estimates[0] == pytest.approx(estimates[1], rel=0.1)
