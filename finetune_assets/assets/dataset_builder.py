"""What the rows of an experiment are tokenized with: its settings, and inputs from the store."""

from typing import TYPE_CHECKING

from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.artifacts.passages import row_passages
from finetune_assets.data.learning import Learning
from finetune_assets.sources.base_models import is_tokenizer_file
from finetune_assets.store.artifacts import ArtifactRef

if TYPE_CHECKING:
    from finetune_assets.data.building import Builder


def dataset_builder(lineage: Lineage, cached_base_model: ArtifactRef) -> "Builder":
    """The builder of an experiment's datasets, with the tokenizer's files and the index fetched."""
    from finetune_assets.data.building import Builder

    config = lineage.experiment.config
    return Builder(
        lineage.store.fetch(cached_base_model, is_tokenizer_file),
        config.data,
        config.model.trust_remote_code is not None,
        lineage.raw.config.split_salt,
        Learning.of(config.training),
        row_passages(lineage),
    )
