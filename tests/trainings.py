"""Trainings on the packaged model that tests only read: each runs once, for all tests of a process."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from training.conftest import ALONE, BASE, MADE_FROM, configured

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainerState, TrainingPaths


@dataclass(frozen=True)
class Trained:
    """A training that has ended.

    Attributes:
        job: Its folders. The files of `job.output` are read-only, for they are every test's.
        config: Its settings, a copy for each test.
        log: What it measured.
    """

    job: TrainingPaths
    config: ExperimentConfig
    log: TrainerState


Train = Callable[..., Trained]
_ended: dict[Any, Trained] = {}


@pytest.fixture
def trained(dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains, with settings that differ, another base and facts that its provenance is to name, unless it was done."""

    def train(*overrides: str, base: Path = BASE, **made_from: str) -> Trained:
        key = (overrides, base, *sorted(made_from.items()))
        if key not in _ended:
            config, folder = configured(*overrides), tmp_path_factory.mktemp("training")
            output = folder / "output"
            output.mkdir()
            rows = dataset(config.data.tokenization)
            job = TrainingPaths(base, rows, output, folder / "scratch", {**MADE_FROM, **made_from})
            run = LoraFinetune(job, config, ALONE, Reporter(print))
            run.run()
            for file in output.iterdir():
                file.chmod(0o444)
            _ended[key] = Trained(job, config, run.log)
        found = _ended[key]
        return Trained(found.job, copy.deepcopy(found.config), found.log)

    return train
