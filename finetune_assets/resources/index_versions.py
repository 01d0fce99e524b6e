"""Versions of retrieval indexes in Dagster's event log, and the one that an automatic run uses.

Automatic runs use only versions that passed their blocking checks. Manual runs read the documents as they are now.
"""

import dagster as dg

from finetune_assets.artifacts.kinds import INDEXES
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.resources.raw_versions import DATA_VERSION_TAG, GOOD_TAG, created_at, datasets_at, newest_first
from finetune_assets.store.artifacts import ArtifactStore

RETRIEVAL_INDEX = dg.AssetKey("retrieval_index")
DOCUMENTS_TAG = "finetune/documents"
"""Tag of a materialization of `retrieval_index`: its document set, by which all experiments that use it find it."""
MOST_TAG = 63
INDEX_VERSION = INDEXES.asset or ""
"""Metadata key of `tokenized_dataset`: fingerprint of the retrieval index that its rows were retrieved from."""


def documents_tag(name: str) -> str:
    """Value of the tag for a document set; hashed, because tag values have at most 63 characters."""
    return name if len(name) <= MOST_TAG else fingerprint(documents=name)[:MOST_TAG]


def newest_good_index(instance: dg.DagsterInstance, documents: str, before: float | None = None) -> str | None:
    """Newest version of a document set's index that passed its blocking checks; None if there is no such version.

    Args:
        instance: Dagster instance.
        documents: Name of the document set.
        before: Ignore later materializations; in seconds since 1970.
    """
    wanted = dg.AssetRecordsFilter(RETRIEVAL_INDEX, before_timestamp=before)
    for materialization in newest_first(instance, wanted):
        tags = materialization.tags or {}
        if GOOD_TAG in tags and tags.get(DOCUMENTS_TAG) == documents_tag(documents):
            return tags.get(DATA_VERSION_TAG)
    return None


def requested_index(
    instance: dg.DagsterInstance, run: dg.DagsterRun, documents: str, store: ArtifactStore
) -> str | None:
    """The version of a document set's index that an automatic run was requested for.

    A run that tokenizes reads the newest good version at the time of its creation. Any other run reads the version of
    the dataset that its experiment had then. A retried run reads what its first attempt read.

    Returns:
        Fingerprint of the version; None if no version of the index was good.
    """
    created = created_at(instance, run)
    for _, made_from in datasets_at(instance, run, created, store):
        if made_from.get(INDEX_VERSION):
            return str(made_from[INDEX_VERSION])
    return newest_good_index(instance, documents, created)
