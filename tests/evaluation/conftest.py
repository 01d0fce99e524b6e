"""Evaluations of trainings on the packaged model."""

from training.conftest import dataset, finetune
from trainings import trained

__all__ = ["dataset", "finetune", "trained"]
