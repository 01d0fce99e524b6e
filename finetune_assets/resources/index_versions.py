"""Versions of retrieval indexes in Dagster's event log, and the one that an automatic run uses.

Automatic runs use only versions that passed their blocking checks. A manual run reads the documents as
they are now.
"""

import dagster as dg

from finetune_assets.artifacts.kinds import INDEXES, TOKENIZED
from finetune_assets.resources.raw_versions import (
    DATA_VERSION_TAG,
    GOOD_TAG,
    OVERRIDES_TAG,
    PARTITION_TAG,
    TOKENIZED_DATASET,
    newest_first,
)
from finetune_assets.store.artifacts import ArtifactStore

RETRIEVAL_INDEX = dg.AssetKey("retrieval_index")
INDEX_VERSION = INDEXES.asset or ""
"""Metadata key of `tokenized_dataset`: fingerprint of the retrieval index that its rows were retrieved from."""


def newest_good_index(instance: dg.DagsterInstance, documents: str, before: float | None = None) -> str | None:
    """Newest version of a document set's index that passed its blocking checks; None if there is no such version.

    Args:
        instance: Dagster instance.
        documents: Name of the document set.
        before: Ignore later materializations; in seconds since 1970.
    """
    wanted = dg.AssetRecordsFilter(RETRIEVAL_INDEX, asset_partitions=[documents], before_timestamp=before)
    good = (made for made in newest_first(instance, wanted) if GOOD_TAG in (made.tags or {}))
    return next(((made.tags or {}).get(DATA_VERSION_TAG) for made in good), None)


def requested_index(
    instance: dg.DagsterInstance, run: dg.DagsterRun, documents: str, store: ArtifactStore
) -> str | None:
    """The version of a document set's index that an automatic run was requested for.

    A run that tokenizes reads the newest good version at the time of its creation. Any other run reads the version of
    the dataset that its experiment had then. A retried run reads what its first attempt read.

    Returns:
        Fingerprint of the version; None if no version of the index was good.
    """
    record = instance.get_run_record_by_id(run.root_run_id or run.run_id)
    created = record.create_timestamp.timestamp() if record else None
    partition = run.tags.get(PARTITION_TAG)
    if partition and run.asset_selection and TOKENIZED_DATASET not in run.asset_selection:
        wanted = dg.AssetRecordsFilter(TOKENIZED_DATASET, asset_partitions=[partition], before_timestamp=created)
        for materialization in newest_first(instance, wanted):
            tags = materialization.tags or {}
            manifest = store.manifest(TOKENIZED.folder, tags.get(DATA_VERSION_TAG, ""))
            if OVERRIDES_TAG not in tags and manifest and manifest.made_from.get(INDEX_VERSION):
                return str(manifest.made_from[INDEX_VERSION])
    return newest_good_index(instance, documents, created)
