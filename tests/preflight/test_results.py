"""A simulation is run once for what it follows from, and again when that changes, or its result is damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from transformers import AutoConfig

from finetune_assets.config.loading import load_experiment
from finetune_assets.preflight.case import Case, Shape
from finetune_assets.preflight.device import Device
from finetune_assets.preflight.memory import Memory, predict
from finetune_assets.store.results import Results

CPU = Device("cpu", 64 << 30, 1, False, "CPU")
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 100,
}


class Run(Exception):
    """A simulation is run: it reads the configuration."""


def predicted(
    folder: Path, *overrides: str, config: dict[str, Any] = TINY, learned: int = 40, run: bool = True
) -> Memory:
    """The memory of a micro-batch, by the results in a folder; `Run` is raised where they do not do, unless it may."""

    def load() -> Any:
        if not run:
            raise Run
        return AutoConfig.for_model(**config)

    shape = Shape(json.dumps(config).encode(), load, Results(folder))
    experiment = load_experiment(ROOT / "configs", "demo", list(overrides)).config
    return predict(Case(shape, experiment, CPU, [20, 30], learned, checkpointing=False))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Memory]:
    """A folder with one result, which was not there before, and what follows from it."""
    folder = tmp_path_factory.mktemp("results") / "simulations"
    with pytest.raises(Run):
        predicted(folder, run=False)
    return folder, predicted(folder)


@pytest.fixture
def kept(once: tuple[Path, Memory], tmp_path: Path) -> Path:
    """The result's file, in a folder of the test's own."""
    folder = Path(shutil.copytree(once[0], tmp_path / "simulations"))
    (file,) = folder.iterdir()
    return file


def test_what_is_kept_is_used(once: tuple[Path, Memory], kept: Path) -> None:
    _, first = once
    assert predicted(kept.parent, run=False) == first
    unread = ["training.learning_rate=0.5", "training.seed=9", "evaluation.samples=3"]
    assert predicted(kept.parent, *unread, run=False) == first, "which no simulation reads"
    content = json.loads(kept.read_text())
    smaller = {**content["result"], "kept": content["result"]["kept"] - 1000}
    Results(kept.parent).put(content["question"], smaller)
    assert predicted(kept.parent, run=False).activations == first.activations - 1000


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        (["lora.rank=3"], {}),
        (["lora.target_modules=[q_proj]"], {}),
        (["model.quantization=int8"], {}),
        (["training.precision=bf16"], {}),
        (["training.precision=full_bf16", "model.dtype=auto"], {}),
        (["training.precision=bf16", "model.dtype=bfloat16"], {}),
        ([], {"learned": 39}),
        ([], {"config": TINY | {"vocab_size": 101}}),
    ],
    ids=str,
)
def test_what_a_simulation_reads_has_it_run_again(kept: Path, overrides: list[str], more: dict[str, Any]) -> None:
    with pytest.raises(Run):
        predicted(kept.parent, *overrides, run=False, **more)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other names", "a folder"])
def test_a_damaged_result_counts_as_none(kept: Path, damage: str) -> None:
    whole = kept.read_text()
    if damage == "a folder":
        kept.unlink()
        kept.mkdir()
    elif damage == "other names":
        Results(kept.parent).put(json.loads(whole)["question"], {"peak": 1})
    else:
        peak = json.loads(whole)["result"]["peak"]
        other = whole.replace(f'"peak": {peak}', f'"peak": {peak + 1}')
        kept.write_text({"cut": whole[:-30], "changed": other, "empty": ""}[damage])
        assert kept.read_text() != whole
    with pytest.raises(Run):
        predicted(kept.parent, run=False)


def test_a_damaged_result_is_made_again(once: tuple[Path, Memory], kept: Path) -> None:
    whole = kept.read_text()
    kept.write_text(whole[:-30])
    assert predicted(kept.parent) == once[1]
    assert kept.read_text() == whole
    assert [*kept.parent.iterdir()] == [kept], "nothing half-written is left"


def test_of_a_model_with_code_of_its_own_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert Shape.read(tmp_path, own_code=True, results=Results(tmp_path)).results is None
    assert Shape.read(tmp_path, own_code=False, results=Results(tmp_path)).results
