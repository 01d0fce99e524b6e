"""Evaluations of trainings on the packaged model."""

from training.conftest import base_model, dataset, finetune
from trainings import trained

__all__ = ["base_model", "dataset", "finetune", "trained"]
