"""Versions of the raw data in Dagster's event log, and the one that an automatic run reads.

Automatic runs follow the configured source alone, and only versions that passed their blocking checks. A run that a
person starts reads the source as it is now.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import TOKENIZED
from finetune_assets.artifacts.raw_lineage import all_sources
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.config.loading import load_raw_data_config
from finetune_assets.resources import deployment
from finetune_assets.sources.names import source_name
from finetune_assets.store.artifacts import ArtifactStore

DOLLY_RAW, TOKENIZED_DATASET = dg.AssetKey("dolly_raw"), dg.AssetKey("tokenized_dataset")
DATA_VERSION_TAG = "dagster/data_version"
PARTITION_TAG = "dagster/partition"
OVERRIDES_TAG = "finetune/overrides"
"""Tag of a materialization with per-run overrides: their number. Automation ignores such materializations."""
TRAINING_VERSION_TAG = "finetune/training_version"
"""Tag of a materialization: its version for automation of trainings, in place of its data version."""
GOOD_TAG = "finetune/good"
"""Tag of a `dolly_raw` materialization that passed its blocking checks. Later versions are compared with it."""
SOURCE_TAG = "finetune/source"
"""Tag of a materialization: hash of the name of the raw data source. Automation ignores those of other sources."""
RAW_VERSION = "dolly_raw"
"""Metadata key of `tokenized_dataset`: fingerprint of the raw data that its run read."""
AWAY = "not_available"
"""Metadata key of `dolly_raw`: names of the sources of which an earlier version is used, or none."""
SOURCE = "source"
"""Metadata key of `dolly_raw`: name of the source."""
PAGE = 20


def configured_source() -> str:
    """Name of the source that this deployment is configured for."""
    configs = deployment.configs()
    return _named(configs, deployment.raw_data(), deployment.file_stamp(configs / "raw_data.yaml"))


@lru_cache
def _named(configs: Path, source: str | None, stamp: tuple[int, int]) -> str:
    """Cached for a file stamp, because each evaluation needs it for each asset."""
    return all_sources(load_raw_data_config(configs, source), configs.parent)


def source_tag(source: str) -> str:
    """Value of `SOURCE_TAG`, whose characters Dagster restricts, for a source's name."""
    return fingerprint(source=source)[:16]


def tag_of_source(materialization: dg.AssetMaterialization) -> str | None:
    """`SOURCE_TAG` of a materialization.

    Earlier versions of this project did not set it. For their materializations of `dolly_raw`, which name the source as
    metadata, it is computed; for all others it is None.
    """
    tag = (materialization.tags or {}).get(SOURCE_TAG)
    if tag is None and SOURCE in materialization.metadata and materialization.asset_key == DOLLY_RAW:
        return source_tag(source_name(str(materialization.metadata[SOURCE].value), deployment.root()))
    return tag


def is_of_source(materialization: dg.AssetMaterialization, source: str) -> bool:
    """Whether a materialization is derived from a source, or does not state its source."""
    return tag_of_source(materialization) in (None, source_tag(source))


def newest_good(instance: dg.DagsterInstance, source: str, before: float | None = None) -> str | None:
    """Newest version of a source's raw data that passed its blocking checks; None if there is no such version.

    Args:
        instance: Dagster instance.
        source: Name of the source.
        before: Ignore later materializations; in seconds since 1970.
    """
    for materialization in newest_first(instance, dg.AssetRecordsFilter(DOLLY_RAW, before_timestamp=before)):
        tags = materialization.tags or {}
        if GOOD_TAG in tags and is_of_source(materialization, source):
            return tags.get(DATA_VERSION_TAG)
    return None


def requested_version(
    instance: dg.DagsterInstance, run: dg.DagsterRun, source: str, store: ArtifactStore
) -> str | None:
    """The version of the raw data that an automatic run was requested for.

    A run that tokenizes reads the newest good version at the time of its creation. Any other run reads the version of
    the dataset that its experiment had then. A retried run reads what its first attempt read.

    Returns:
        Fingerprint of the version; None if no version of the source was good.
    """
    created = created_at(instance, run)
    for materialization, made_from in datasets_at(instance, run, created, store):
        if not is_of_source(materialization, source):
            continue
        if RAW_VERSION in materialization.metadata:
            return str(materialization.metadata[RAW_VERSION].value)
        if made_from.get("dolly_raw"):
            return str(made_from["dolly_raw"])
    return newest_good(instance, source, created)


def created_at(instance: dg.DagsterInstance, run: dg.DagsterRun) -> float | None:
    """When the first attempt of a run was created, in seconds since 1970; None if it is not known any more."""
    record = instance.get_run_record_by_id(run.root_run_id or run.run_id)
    return record.create_timestamp.timestamp() if record else None


def datasets_at(
    instance: dg.DagsterInstance, run: dg.DagsterRun, created: float | None, store: ArtifactStore
) -> Iterator[tuple[dg.AssetMaterialization, dict[str, Any]]]:
    """Datasets of a run's experiment that were made before the run, newest first, with what each is made from.

    Datasets with overrides are left out; a run that tokenizes, or has no experiment, has none.
    """
    partition = run.tags.get(PARTITION_TAG)
    if not partition or not run.asset_selection or TOKENIZED_DATASET in run.asset_selection:
        return
    wanted = dg.AssetRecordsFilter(TOKENIZED_DATASET, asset_partitions=[partition], before_timestamp=created)
    for materialization in newest_first(instance, wanted):
        tags = materialization.tags or {}
        if OVERRIDES_TAG not in tags:
            manifest = store.manifest(TOKENIZED.folder, tags.get(DATA_VERSION_TAG, ""))
            yield materialization, manifest.made_from if manifest else {}


def newest_first(instance: dg.DagsterInstance, wanted: dg.AssetRecordsFilter) -> Iterator[dg.AssetMaterialization]:
    """Materializations that a filter selects, newest first."""
    cursor = None
    while True:
        page = instance.fetch_materializations(wanted, limit=PAGE, cursor=cursor)
        yield from (record.asset_materialization for record in page.records if record.asset_materialization)
        if not page.has_more:
            return
        cursor = page.cursor
