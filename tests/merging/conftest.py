"""Trainings on the packaged model, whose adapters are merged and combined."""

from training.conftest import base_model, dataset, finetune
from trainings import trained

__all__ = ["base_model", "dataset", "finetune", "trained"]
