"""What is measured and recorded of a training."""

import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training.measuring import names

from finetune_assets.training.divergence import TrainingStalled
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.telemetry import Utilisation, multiplied_weights, peak_flops

Finetune = Callable[..., LoraFinetune]
CPU = torch.device("cpu")


def test_weights_that_a_token_is_multiplied_with(finetune: Finetune) -> None:
    """The output layer counts, also where it shares its weights with the embedding, which does not count beside it."""
    run = finetune()
    config = run.model.config
    width, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    layer = width * config.num_attention_heads * config.head_dim * 2 + 2 * width * kv + 3 * width * inner
    assert run.multiplied_weights == config.num_hidden_layers * layer + config.vocab_size * width
    quantized = finetune("model.quantization=nf4", name="nf4")
    assert quantized.multiplied_weights == run.multiplied_weights


def test_shared_weights_count_once() -> None:
    one = nn.Linear(3, 5)
    assert multiplied_weights(nn.ModuleList([one, one, nn.Linear(2, 2), nn.Embedding(9, 9)])) == 15 + 4


def test_peak_is_about_what_a_multiplication_reaches() -> None:
    rate, _ = peak_flops(CPU, "fp32")
    a = torch.randn(512, 512)
    began = time.perf_counter()
    for _ in range(20):
        a @ a
    assert rate > 0.3 * 20 * 2 * 512**3 / (time.perf_counter() - began)


def test_each_line_and_the_record_hold_what_was_promised(
    finetune: Finetune, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetune("training.max_steps=4", "training.logging_steps=1", "training.eval_steps=2")
    run.run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    state = json.loads((run.job.output / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["history"]] == [1, 2, 3, 4]
    assert [entry["step"] for entry in state["history"] if "held_out_loss" in entry] == [2, 4]
    for entry, line in zip(state["history"], lines, strict=True):
        assert line.startswith(f"step {entry['step']}/4")
        values = [f"{entry['loss']:.4f}", f"{entry['grad_norm']:.3f}", f"{entry['learning_rate']:.2e}"]
        values += [f"{entry['tokens_per_second']:,.0f}", f"{entry['mfu']:.0%}"]
        values += [f"{entry['held_out_loss']:.4f}"] if "held_out_loss" in entry else []
        assert all(value in line for value in values)
    assert state["active"]["attention"] == "varlen"
    assert state["active"]["loss"] == "fused"
    assert "4N" in state["active"]["mfu"], "the operations that a token is counted with"
    for entry in state["history"]:
        expected = 4 * run.multiplied_weights * entry["tokens_per_second"] / run.peak_flops
        assert entry["mfu"] == pytest.approx(expected)
        assert entry["peak_memory_mib"] > 50
    assert not (run.job.output / "gpu_utilisation.csv").exists(), "no GPU here, no table"


def test_training_without_any_gradient_is_ended(finetune: Finetune, base_model: Callable[[str], Path]) -> None:
    small = ("training.macro_batch_size=1", "training.micro_batch_size=1")
    run = finetune("training.max_steps=60", "training.logging_steps=5", *small, base=base_model("llama"))
    for parameter in run.parameters:
        parameter.data.zero_()  # with both halves of the adapter zero neither has a gradient
    with pytest.raises(TrainingStalled) as error:
        run.run()
    assert run.log.step == 20
    assert names(error, "step 20", "training.learning_rate", "data.tokenization.cutoff_len")
    assert not list(run.job.output.iterdir())


def test_what_the_gpus_did_becomes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's library stood for, as there is no GPU: one that tells all, and one that does not know its power."""

    class NVMLError(Exception):
        pass

    def power(gpu: int) -> int:
        if gpu:
            raise NVMLError
        return 345_600

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda gpu: gpu,
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=97),
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=70 << 30),
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetTemperature=lambda gpu, kind: 61,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr("finetune_assets.training.telemetry.SAMPLE_SECONDS", 0.02)
    utilisation = Utilisation()
    utilisation.step = 7
    with utilisation.sampling(torch.device("cuda", 0)):
        time.sleep(0.3)
    utilisation.write(tmp_path / "gpu.csv")
    header, *rows = csv.reader((tmp_path / "gpu.csv").open())
    assert tuple(header) == Utilisation.COLUMNS
    assert len(rows) > 3
    assert rows[0][1:] == ["7", "0", "97", str(70 << 10), "345.6", "61"]
    assert rows[1][1:] == ["7", "1", "97", str(70 << 10), "", "61"]
