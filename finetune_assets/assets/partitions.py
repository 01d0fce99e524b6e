"""Experiment partitions: one per file in `configs/experiments/`."""

import warnings

import dagster as dg

from finetune_assets.config.loading import experiment_names
from finetune_assets.resources import deployment

experiments = dg.StaticPartitionsDefinition(experiment_names(deployment.configs()))


def check_of_each(asset: str, name: str, description: str, blocking: bool = True) -> dg.AssetCheckSpec:
    """Spec of an asset check that is evaluated separately for each experiment partition."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitions_def, which automation requires
        return dg.AssetCheckSpec(
            name, asset=asset, blocking=blocking, partitions_def=experiments, description=description
        )
