"""One partition an experiment: the names of the files in `configs/experiments/`."""

import warnings

import dagster as dg

from finetune_assets.config.loading import experiment_names
from finetune_assets.resources import deployment

experiments = dg.StaticPartitionsDefinition(experiment_names(deployment.configs()))


def check_of_each(asset: str, name: str, description: str, blocking: bool = True) -> dg.AssetCheckSpec:
    """A check of an asset that is partitioned by experiment, whose result is each partition's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # of partitions_def, on which the automation stands
        return dg.AssetCheckSpec(
            name, asset=asset, blocking=blocking, partitions_def=experiments, description=description
        )
