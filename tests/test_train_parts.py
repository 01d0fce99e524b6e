"""The parts of the benchmark on a GPU: they end in time, and report every figure."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from emulated_gpu import NAME, emulated_gpu
from paths import ROOT

from benchmarks import train, train_gpu, train_subject
from benchmarks.train_parts import PART_SECONDS, PARTS, Deadline
from benchmarks.train_recipes import ours
from finetune_assets.sources.local import SAMPLE


class Machine:
    """A clock, and recipes that take time on it.

    Attributes:
        now: Seconds.
        seconds: Duration of a run of each recipe.
        ran: Runs so far.
    """

    def __init__(self, **seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds
        self.ran: Counter[str] = Counter()

    def run(self, recipe: str, subject: Path, settings: dict[str, Any], device: str, limit_s: float) -> Any:
        assert device == "cuda"
        self.ran[recipe] += 1
        self.now += min(self.seconds[recipe], limit_s)
        if self.seconds[recipe] > limit_s:
            return None
        speed = settings["micro"] * (2000.0 if recipe == "ours" else 1000.0)
        return {
            "tokens_per_s": speed, "flops": 32e9 * speed, "peak_flops": 989e12, "peak_memory_mib": 20_000, "loss": 2.5,
            "grad_norm": 0.7, "tokens": 90_000, "steps": 5, "settings": settings, "hardware": NAME,
        }  # fmt: skip


def test_a_part_ends_in_time() -> None:
    """A run begins only if the longest so far would end in time, and is stopped where it does not."""
    machine = Machine(ours=30, hf=45, trl=90, llamafactory=5)
    deadline = Deadline(PART_SECONDS, clock=lambda: machine.now)
    sides = train_gpu.measured(PARTS["peers"], Path("subject"), 3, machine.run, deadline)
    assert machine.now <= PART_SECONDS
    assert list(sides) == ["e ours", "b HF Trainer"]
    assert sides["b HF Trainer"][0]["settings"]["micro"] == 8, "the faster setting"
    assert machine.ran == {"ours": 1, "hf": 2, "trl": 1}
    assert len(deadline.left_out) == 6
    assert 3 * PART_SECONDS <= 600


def test_a_part_without_haste_has_all_runs() -> None:
    machine = Machine(ours=5, hf=5, trl=5, llamafactory=5)
    deadline = Deadline(PART_SECONDS, clock=lambda: machine.now)
    sides = train_gpu.measured(PARTS["peers"], Path("subject"), 3, machine.run, deadline)
    assert {name: len(runs) for name, runs in sides.items()} == dict.fromkeys(PARTS["peers"], 3)
    assert deadline.left_out == []


@pytest.mark.parametrize("part", PARTS)
def test_a_part_writes_its_figures(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(ours=5, hf=5, trl=5, llamafactory=5)
    subject = train_subject.Subject("model", "packed", "rows", 600, 4096, 100, 5)
    monkeypatch.setattr(train_subject, "make", lambda *_: subject)
    arguments = ["train", "--device", "cuda", "--part", part, "--out", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(train, "run", machine.run)
    train.main()
    result = json.loads((tmp_path / f"{part}.json").read_text())
    assert result["sides"].keys() == PARTS[part].keys()
    assert result["hardware"] == NAME
    assert "4N" in result["mfu_convention"]
    figures = result["sides"]["e ours"]
    assert figures["mfu"] == pytest.approx(32e9 * 4000 / 989e12)
    assert figures | {"tokens_per_s": 4000, "peak_memory_mib": 20_000, "grad_norm": 0.7, "runs": 3} == figures
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ratios == result["ratios"]
    wanted = {
        "peers": {"vs_best_peer": 0.5, "memory_vs_hf_bf16": 1.0},
        "kernels": {"liger_vs_bf16": 1.0, "compiled_vs_bf16": 1.0},
        "quantized": {"nf4_vs_bf16": 1.0, "int8_vs_bf16": 1.0, "vs_reference": 1.0},
    }
    assert ratios | wanted[part] == ratios


def test_settings_of_every_side_are_valid() -> None:
    """Of ours: those of the parts are settings that the recipe reads."""
    read = (ROOT / "benchmarks" / "train_recipes" / "ours.py").read_text()
    for recipes in PARTS.values():
        for recipe, tried in recipes.values():
            assert (ROOT / "benchmarks" / "train_recipes" / f"{recipe}.py").is_file()
            for settings in tried if recipe == "ours" else []:
                assert all(f'"{name}"' in read for name in settings), settings


@pytest.mark.system
def test_our_recipe_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the benchmark runs it, on an emulated GPU and a small shape."""
    shape = {**train_subject.SHAPES["13m"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    monkeypatch.setitem(train_subject.SHAPES, "tiny", {**shape, "num_attention_heads": 4, "num_key_value_heads": 2})
    with emulated_gpu():
        subject = train_subject.make(tmp_path, "tiny", SAMPLE, 40, 128, 3, "cuda")
        subject.write(tmp_path / "subject.json")
        monkeypatch.setattr(sys, "argv", ["ours", str(tmp_path / "subject.json"), json.dumps({"micro": 2})])
        ours.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["hardware"] == NAME
    assert figures["peak_flops"] == 989e12
    assert figures["flops"] == pytest.approx(figures["tokens_per_s"] * 4 * weights_multiplied(shape), rel=1e-6)
    assert figures["peak_memory_mib"] == 3072
    assert figures["grad_norm"] > 0
    assert figures["active"]["precision"] == "bf16"


def weights_multiplied(shape: dict[str, Any]) -> int:
    """Weights of the tiny shape's linear layers, with 4 heads of 16, of which 2 are for keys and values."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    return width * (2 * width + 2 * 32 + 3 * inner + shape["vocab_size"])
