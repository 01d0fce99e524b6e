"""Partitions: experiments, one per file in `configs/experiments/`, and document sets, one per file in
`configs/documents/`."""

import warnings
from collections.abc import Callable
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import INDEXES, ArtifactKind
from finetune_assets.config.documents import document_sets as document_set_names
from finetune_assets.config.documents import users_of_documents
from finetune_assets.config.loading import experiment_names
from finetune_assets.resources import deployment

GROUP = "finetune"
"""Group of all assets. With several groups, Dagster's global lineage opens with every group collapsed."""
OWNERS = ["team:finetune"]
UNPARTITIONED = ("dolly_raw", "experiment_report")
"""Assets of the deployment, not of an experiment."""
experiments = dg.StaticPartitionsDefinition(experiment_names(deployment.configs()))
document_sets = dg.StaticPartitionsDefinition(
    sorted({*document_set_names(deployment.configs()), *experiments.get_partition_keys()})
)
"""Partitions of `retrieval_index`: document sets. An experiment is a partition for the set that it retrieves from,
so that one run with `--partition EXPERIMENT` materializes everything that the experiment needs."""
retrieved_from = dg.AssetDep(
    "retrieval_index",
    partition_mapping=dg.StaticPartitionMapping(users_of_documents(deployment.configs())),
)
"""Dependency of an experiment's asset on the index of its document set, if it has one. Its version is looked up in the
settings of each run; experiments that begin to use another set are shown below it once the definitions are reloaded."""


def check_of_each(asset: str, name: str, description: str, blocking: bool = True) -> dg.AssetCheckSpec:
    """Spec of an asset check that is evaluated separately for each experiment partition."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitions_def, which automation requires
        return dg.AssetCheckSpec(
            name, asset=asset, blocking=blocking, partitions_def=experiments, description=description
        )


def _partitions_of(kind: ArtifactKind) -> dg.PartitionsDefinition | None:
    if kind.asset in UNPARTITIONED:
        return None
    return document_sets if kind is INDEXES else experiments


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
