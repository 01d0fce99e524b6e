"""The gate on real rows: how often it promotes what is no better, and how small a gain it finds."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from raw import ingest
from training.conftest import ALONE, MADE_FROM

from finetune_assets.config.loading import load_experiment
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation import gate
from finetune_assets.evaluation.contenders import Contender, LoadedModels
from finetune_assets.evaluation.losses import RowLosses
from finetune_assets.evaluation.rows import held_out
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths

EXPERIMENT = """
model: {{base_model: {model}, dtype: float32}}
data:
  num_samples: 6000
  gate_fraction: 0.05
  tokenization: {{cutoff_len: 384, packing: false}}
training: {{max_steps: 12, macro_batch_size: 12, micro_batch_size: 6, learning_rate: 7.0e-3, precision: fp32}}
lora: {{dropout: 0.0, rank: 4, alpha: 8}}
"""
FLIPS = 1_000
Differences = tuple[NDArray[np.float64], NDArray[np.int64]]


@pytest.fixture
def differences(
    dolly: Path, stories260k: Path, tmp_path: Path, configs_with: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Differences:
    """What one real adapter saves over another on real rows: nats a row, and tokens a row."""
    if not os.environ.get("SOAK"):
        monkeypatch.setattr(gate, "RESAMPLES", 2_000)
    configs = configs_with(EXPERIMENT.format(model=stories260k))
    config = load_experiment(configs, "real").config
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    prepare_dataset(ingest(tmp_path / "raw", dolly), load_tokenizer(str(stories260k)), config.data, "salt", dataset)
    rows, losses = held_out(dataset, "gate", config.data).examples, []
    for seed in (1, 2):
        trained = load_experiment(configs, "real", [f"training.seed={seed}"]).config
        output = tmp_path / f"{seed}" / "output"
        output.mkdir(parents=True)
        job = TrainingPaths(stories260k, dataset, output, output.parent / "scratch", MADE_FROM)
        LoraFinetune(job, trained, ALONE, Reporter(print)).run()
        contender = Contender.of_folder("challenger", stories260k, output)
        with LoadedModels(ALONE.device).loaded(contender) as model:
            losses.append(RowLosses(model, trained, ALONE.device).of(rows))
    assert len(rows) > 200
    return losses[0] - losses[1], rows.learned


@pytest.fixture
def configs_with(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        folder = tmp_path / "configs" / "experiments"
        folder.mkdir(parents=True)
        (folder.parent / "base.yaml").touch()
        (folder / "real.yaml").write_text(text)
        return folder.parent

    return write


def promoted(saved: NDArray[np.float64], tokens: NDArray[np.int64], seed: int) -> bool:
    return gate.paired_gain(saved, np.zeros_like(saved), tokens, 0.95, seed).lower > 0


@pytest.mark.soak
@pytest.mark.real_data
def test_noise_is_promoted_as_seldom_as_it_says_and_real_gains_are_found(differences: Differences) -> None:
    """At 95% confidence, 1,000 random flips of who is who promote at most 65 times; a gain of 2.8 standard errors, that
    an exact test would find in 88% of draws, is found in 80%."""
    saved, tokens = differences
    rng = np.random.default_rng(0)
    by_chance = sum(promoted(saved * rng.choice([-1.0, 1.0], len(saved)), tokens, flip) for flip in range(FLIPS))
    assert by_chance <= 65

    centred = saved - saved.sum() / tokens.sum() * tokens
    error = float(np.sqrt((centred**2).sum()) / tokens.sum())
    gain = 2.8 * error
    draws = [rng.integers(0, len(saved), len(saved)) for _ in range(200)]
    found = sum(promoted((centred + gain * tokens)[rows], tokens[rows], draw) for draw, rows in enumerate(draws))
    print(f"{by_chance} of {FLIPS} flips; {found} of 200 draws of {gain:.4f} nats a token; {len(saved)} rows")
    assert found >= 160
