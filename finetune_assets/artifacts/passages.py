"""Passages of an experiment's rows: from the index of its document set, in the store."""

from typing import TYPE_CHECKING

from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.config.schema import Data
from finetune_assets.store.artifacts import ArtifactRef

if TYPE_CHECKING:
    from finetune_assets.retrieval.contexts import Passages


def row_passages(lineage: Lineage, index: ArtifactRef | None = None, data: Data | None = None) -> "Passages | None":
    """Where the passages of an experiment's rows come from; None without `data.retrieval`.

    Args:
        lineage: Lineage of the experiment.
        index: The index; by default, that of the experiment's document set.
        data: The data settings; by default, those of the experiment.
    """
    from finetune_assets.retrieval.contexts import Passages

    data, used = data or lineage.experiment.config.data, index or lineage.index()
    if data.retrieval is None or used is None:
        return None
    return Passages(lineage.store.fetch(used), data, lineage.raw.config.split_salt)
