"""Merged, an adapter computes what it did on its base; merged into another base than it was trained on, it does not."""

from pathlib import Path

import pytest
from tiers import tiered
from training.conftest import ALONE
from trainings import Train, Trained

from finetune_assets.assets.merged_model import OF_INT8, ROUNDING
from finetune_assets.config.schema import Merge
from finetune_assets.evaluation.contenders import Contender
from finetune_assets.evaluation.rows import held_out
from finetune_assets.merging.merge import LogitDifference, compare, merged, positions, reference

LEARNS_FAST = "training.learning_rate=0.02"


def difference(run: Trained, out: Path, merge: Merge) -> LogitDifference:
    def contender() -> Contender:
        return Contender.of_folder("adapter", run.job.base_model, run.job.output)

    rows = positions(held_out(run.job.dataset, "val", run.config.data), merge.compared_rows)
    wanted = reference(contender(), rows, ALONE.device)
    merged(contender(), merge, out)
    return compare(out, rows, wanted, ALONE.device)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_float32_nothing_is_lost(trained: Train, tmp_path: Path, quantization: str) -> None:
    run = trained(LEARNS_FAST, f"model.quantization={quantization}")
    found = difference(run, tmp_path / "merged", Merge(dtype="float32"))
    assert found.largest <= 1e-4
    assert found.share <= ROUNDING["float32"]
    assert found.same_choice == 1
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


@pytest.mark.parametrize("dtype", tiered(["bfloat16", "float16"], {"float16"}))
def test_in_16_bits_only_rounding_is_lost(trained: Train, tmp_path: Path, dtype: str) -> None:
    found = difference(trained(LEARNS_FAST), tmp_path / "merged", Merge(dtype=dtype))  # type: ignore[arg-type]
    assert ROUNDING["float32"] < found.share <= ROUNDING[dtype]


@pytest.mark.system
def test_over_int8_what_its_input_is_rounded_by_is_lost(trained: Train, tmp_path: Path) -> None:
    found = difference(trained(LEARNS_FAST, "model.quantization=int8"), tmp_path / "merged", Merge(dtype="float32"))
    assert found.share <= OF_INT8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_into_the_published_base_of_a_quantized_training_is_caught(
    trained: Train, tmp_path: Path, dtype: str
) -> None:
    run = trained(LEARNS_FAST, "model.quantization=nf4")
    found = difference(run, tmp_path / "merged", Merge(onto="published", dtype=dtype))  # type: ignore[arg-type]
    assert found.share > ROUNDING[dtype]


@pytest.mark.parametrize(
    "setting",
    tiered(
        ["lora.use_dora=true", "data.tokenization.added_tokens=['<|x|>']", "lora.bias=all", "lora.use_rslora=true"],
        {"data.tokenization.added_tokens=['<|x|>']"},
        {"lora.use_dora=true"},
    ),
)
def test_every_kind_of_adapter_merges(trained: Train, tmp_path: Path, setting: str) -> None:
    found = difference(trained(LEARNS_FAST, setting), tmp_path / "merged", Merge(dtype="float32"))
    assert found.largest <= 1e-4
