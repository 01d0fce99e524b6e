"""Evaluations of trainings on the packaged model."""

from training.conftest import dataset, finetune

__all__ = ["dataset", "finetune"]
