"""Passages of an experiment's rows: from the index of its document set, in the store."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.config.schema import Data
from finetune_assets.store.artifacts import ArtifactRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune_assets.retrieval.contexts import RowContexts


def row_contexts(
    lineage: Lineage,
    raw: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    index: ArtifactRef | None = None,
    data: Data | None = None,
) -> "RowContexts | None":
    """What puts passages into the rows of an experiment; None without `data.retrieval`.

    Args:
        lineage: Lineage of the experiment.
        raw: Parquet files of the raw data that the experiment uses; needed for training rows alone.
        tokenizer: The experiment's tokenizer.
        index: The index; by default, that of the experiment's document set.
        data: The data settings; by default, those of the experiment.
    """
    from finetune_assets.data.tokenization import Encoder
    from finetune_assets.retrieval.contexts import RowContexts, held_out_passages

    data, salt, models = data or lineage.experiment.config.data, lineage.raw.config.split_salt, lineage.raw.root
    used = index or lineage.index()
    if data.retrieval is None or used is None:
        return None
    folder, longest = lineage.store.fetch(used), data.tokenization.cutoff_len
    held_out = held_out_passages(raw, folder, data, salt, models)
    return RowContexts(folder, data.retrieval, salt, Encoder(tokenizer, data), longest, held_out, models)


def retrieval_of_adapter(lineage: Lineage, dataset: ArtifactRef) -> dict[str, Any] | None:
    """What an adapter is to be asked with, from the provenance of its dataset; None without `data.retrieval`."""
    from finetune_assets.retrieval.contexts import BETWEEN, PASSAGE

    retrieval = lineage.experiment.config.data.retrieval
    manifest = lineage.store.manifest(dataset.kind, dataset.name)
    index = manifest.made_from.get("retrieval_index") if manifest else None
    if retrieval is None or index is None:
        return None
    settings = asdict(retrieval)
    names = ("documents", "passages", "cite", "without_golden", "refusal", "closed_book")
    return {"index": index, **{name: settings[name] for name in names}, "passage": PASSAGE, "between": BETWEEN}
