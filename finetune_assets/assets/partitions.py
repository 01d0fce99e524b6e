"""Partitions of all assets of experiments: one per file in `configs/experiments/`."""

import warnings
from collections.abc import Callable
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import ArtifactKind
from finetune_assets.config.loading import experiment_names
from finetune_assets.resources import deployment

GROUP = "finetune"
"""Group of all assets. With several groups, Dagster's global lineage opens with every group collapsed."""
OWNERS = ["team:finetune"]
UNPARTITIONED = ("dolly_raw", "experiment_report")
"""Assets of the deployment, not of an experiment."""
experiments = dg.StaticPartitionsDefinition(experiment_names(deployment.configs()))


def check_of_each(asset: str, name: str, description: str, blocking: bool = True) -> dg.AssetCheckSpec:
    """Spec of an asset check that is evaluated separately for each experiment partition."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitions_def, which automation requires
        return dg.AssetCheckSpec(
            name, asset=asset, blocking=blocking, partitions_def=experiments, description=description
        )


def _partitions_of(kind: ArtifactKind) -> dg.PartitionsDefinition | None:
    return None if kind.asset in UNPARTITIONED else experiments


def project_asset(
    kind: ArtifactKind, technology: str, **options: Any
) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """`@dg.asset` with the arguments that all assets of this project have.

    Args:
        kind: Kind of the artifact that the asset publishes, whose code version is Dagster's.
        technology: Icon of the asset in Dagster's UI.
        options: Further arguments of `@dg.asset`.
    """
    decorator: Callable[[Callable[..., Any]], dg.AssetsDefinition] = dg.asset(
        group_name=GROUP,
        kinds={technology},
        owners=OWNERS,
        tags={"finetune/kind": kind.folder},
        code_version=kind.code_version,
        partitions_def=_partitions_of(kind),
        **options,
    )
    return decorator
