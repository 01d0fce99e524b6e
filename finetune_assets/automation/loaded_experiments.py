"""Experiments that the loaded definitions have a partition for, so that a sensor may request runs of them.

Settings are read from files at each tick, but partitions only when the definitions are loaded, about once a minute by
the daemon. Dagster fails the whole tick of a sensor that requests an unknown partition.
"""

from collections.abc import Set

import dagster as dg


def loaded_experiments(context: dg.SensorEvaluationContext, asset: dg.AssetKey) -> Set[str]:
    """Names of the experiments that an asset has a partition for in the loaded definitions."""
    assert context.repository_def, "Dagster evaluates each sensor in the repository that it belongs to"
    partitions = context.repository_def.assets_defs_by_key[asset].partitions_def
    return {*partitions.get_partition_keys()} if partitions else set()
