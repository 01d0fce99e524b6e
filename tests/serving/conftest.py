"""Trainings on the packaged model, whose adapters are made servable."""

from training.conftest import base_model, dataset
from trainings import trained

__all__ = ["base_model", "dataset", "trained"]
