"""Several adapters of one base, combined into one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trainings import Train, Trained
from transformers import AutoModelForCausalLM

from finetune_assets.config.schema import Stack
from finetune_assets.merging.stacking.cli import stacked
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.training.model import ModelError

FOLDER = PACKAGED["demo-base"]
MODULE = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.fixture
def two(trained: Train) -> Callable[..., list[Trained]]:
    return lambda *of_the_second: [
        trained("lora.rank=4"),
        trained("training.seed=7", *(of_the_second or ["lora.rank=4"])),
    ]


def combined(runs: list[Trained], stack: Stack) -> PeftModel:
    config = runs[0].config
    config.stack = stack
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return stacked(base, config, [run.job.output for run in runs])


def update(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FOLDER), folder).peft_config["default"]
    a, b = (tensors[f"{MODULE}.lora_{side}.weight"] for side in "AB")
    return b @ a * (config.lora_alpha / config.r)


@pytest.mark.system
def test_by_svd_the_updates_are_added_as_weighted(two: Callable[..., list[Trained]], tmp_path: Path) -> None:
    runs = two()
    model = combined(runs, Stack({"one": 0.75, "two": 0.25}, "svd", svd_rank=8))
    model.save_pretrained(tmp_path / "stack")
    wanted = 0.75 * update(runs[0].job.output) + 0.25 * update(runs[1].job.output)
    assert torch.allclose(update(tmp_path / "stack"), wanted, atol=1e-6)
    assert [*model.peft_config] == ["default"]


@pytest.mark.parametrize("method", ["linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_each_method_gives_an_adapter_that_computes(two: Callable[..., list[Trained]], method: str) -> None:
    model = combined(two(), Stack({"one": 0.5, "two": 0.5}, method))  # type: ignore[arg-type]
    with torch.inference_mode():
        with_adapter = model(input_ids=torch.tensor([[1, 5, 9]])).logits
        with model.disable_adapter():
            without = model(input_ids=torch.tensor([[1, 5, 9]])).logits
    assert with_adapter.isfinite().all()
    assert not torch.allclose(with_adapter, without)


def test_ranks_that_do_not_go_together_are_refused(two: Callable[..., list[Trained]]) -> None:
    with pytest.raises(ModelError, match=r"stack\.method: linear"):
        combined(two("lora.rank=8"), Stack({"one": 0.5, "two": 0.5}, "linear"))
