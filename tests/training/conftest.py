"""Trainings on the packaged model, small enough to run many."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from paths import ROOT
from raw import ingest

from finetune_assets.config.loading import load_experiment
from finetune_assets.config.schema import ExperimentConfig, Tokenization
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.sources import SAMPLE
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.store.base_models import PACKAGED
from finetune_assets.training.distributed import Process
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import Job

ALONE = Process(rank=0, world=1, device=torch.device("cpu"))
MADE_FROM = {"fingerprint": "f" * 64, "experiment": "demo", "base_model": "packaged/demo-base", "revision": "r"}


def configured(*overrides: str) -> ExperimentConfig:
    return load_experiment(ROOT / "configs", "demo", ["training.max_steps=3", *overrides]).config


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes tokenized datasets of 80 rows, each kind once."""
    raw = tmp_path_factory.mktemp("raw")
    rows = ingest(raw, SAMPLE)
    made: dict[str, Path] = {}

    def make(tokenization: Tokenization) -> Path:
        kind = repr(tokenization)
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("dataset")
            data = configured("data.num_samples=80").data
            data.tokenization = tokenization
            tokenizer = load_tokenizer(str(PACKAGED["demo-base"]), tokenization.added_tokens)
            prepare_dataset(rows, tokenizer, data, "salt", made[kind])
        return made[kind]

    return make


@pytest.fixture
def finetune(dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., LoraFinetune]:
    """Makes trainings; `name` keeps their folders apart."""

    def make(
        *overrides: str, name: str = "run", warm_start: Path | None = None, base: Path = PACKAGED["demo-base"]
    ) -> LoraFinetune:
        config = configured(*overrides)
        output = tmp_path / name / "output"
        output.mkdir(parents=True, exist_ok=True)
        folder = dataset(config.data.tokenization)
        job = Job(base, folder, output, tmp_path / name / "scratch", MADE_FROM, warm_start)
        return LoraFinetune(job, config, ALONE, Reporter(print))

    return make
