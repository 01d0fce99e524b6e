"""Asset `dolly_raw`: raw instruction data as one Parquet file with a documented schema."""

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import RAW
from finetune_assets.assets.materialization import (
    ARTIFACT,
    asset_step,
    column_schema,
    materialize_or_reuse,
    publish_built,
    result,
)
from finetune_assets.assets.partitions import project_asset
from finetune_assets.assets.pictures import of_rows
from finetune_assets.assets.raw_checks import BLOCKING, RAW_CHECKS
from finetune_assets.assets.raw_checks.check import Version
from finetune_assets.assets.raw_checks.profile import PROFILE, last_good
from finetune_assets.resources.project import GOOD_TAG, Project
from finetune_assets.store.artifacts import ArtifactRef

STATISTICS = "statistics.json"
FILES = 20
"""Maximum number of ignored files in the log and in the metadata."""
STALE_AFTER = timedelta(days=30)
"""Age at which Dagster's UI shows the raw data as stale; it stops nothing."""


@project_asset(
    RAW,
    "parquet",
    dagster_type=ARTIFACT,
    check_specs=[check.spec for check in RAW_CHECKS],
    freshness_policy=dg.FreshnessPolicy.time_window(fail_window=STALE_AFTER),
)
def dolly_raw(context: dg.AssetExecutionContext, project: Project) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """The deployment's instruction data (`configs/raw_data.yaml`), read row by row and stored as Parquet.

    All experiments read this asset; each selects its categories and its fraction of the rows. Invalid rows are
    quarantined in `quarantine.jsonl`, with file, line and reason.
    """
    from finetune_assets.data.errors import DataError
    from finetune_assets.data.ingest import write_raw

    with asset_step(context, retried=True):
        lineage = project.raw(asks_hub=True)

        def build(folder: Path) -> None:
            statistics = write_raw(lineage.source.files(), lineage.config.columns, folder)
            statistics.ignored_files = [*lineage.source.ignored_files()]
            if not lineage.is_unchanged():
                raise DataError(f"{lineage.config.source}: rows changed during the read; materialize dolly_raw again")
            (folder / STATISTICS).write_text(json.dumps(asdict(statistics)), encoding="utf-8")

        def make() -> ArtifactRef:
            made_from = {"source": lineage.config.source, "content": lineage.content}
            return publish_built(project, RAW, lineage.fingerprint, lineage.fingerprint, made_from, build)

        outcome = materialize_or_reuse(context, project, RAW, lineage.fingerprint, make)
        lineage.pins.record()
        statistics = _statistics(project, outcome.ref)
        if not lineage.source.is_pinned:  # other files may come and go while the rows are the same
            statistics["ignored_files"] = [*lineage.source.ignored_files()]
        if ignored := statistics["ignored_files"]:
            context.log.info(f"Files that are not read: {len(ignored):,}, such as {', '.join(ignored[:FILES])}")
        previous = last_good(context.instance, lineage.fingerprint, lineage.config.source)
        version = Version(context, statistics, lineage.config, previous)
        checks = [check.evaluate(version) for check in RAW_CHECKS]
        passed = all(check.passed for check in checks if check.check_name in BLOCKING)
        profile = {PROFILE: dg.MetadataValue.json(version.profile.to_dict())}
        tags = {GOOD_TAG: "true"} if passed else {}
        return result(outcome, checks, tags, source=lineage.config.source, **_describe(statistics), **profile)


def _statistics(project: Project, ref: ArtifactRef) -> dict[str, Any]:
    from finetune_assets.data.ingest import RawStatistics

    folder = project.store().fetch(ref, lambda path: path == STATISTICS)
    # An artifact of an earlier version lacks the statistics that were added since
    return asdict(RawStatistics()) | json.loads((folder / STATISTICS).read_text(encoding="utf-8"))


def _describe(statistics: dict[str, Any]) -> dict[str, object]:
    from finetune_assets.data.raw_schema import RAW_SCHEMA
    from finetune_assets.data.tables import conversations_table, rows_table

    counts = [{"category": name, "rows": rows} for name, rows in statistics["categories"].items()]
    conversations = statistics["conversation_preview"]
    return {
        "dagster/row_count": statistics["rows"],
        "dagster/column_schema": column_schema(RAW_SCHEMA),
        "rows_with_context": statistics["with_context"],
        "conversations": statistics["conversations"],
        "quarantined": statistics["quarantined"],
        **of_rows(statistics),
        "categories": dg.MetadataValue.md(rows_table(counts, ["category", "rows"])),
        "preview": dg.MetadataValue.md(
            rows_table(statistics["preview"], ["instruction", "context", "response", "category"])
        ),
        **({"preview_conversations": dg.MetadataValue.md(conversations_table(conversations))} if conversations else {}),
        **_ignored(statistics),
    }


def _ignored(statistics: dict[str, Any]) -> dict[str, object]:
    """What was not read; empty if everything was."""
    from finetune_assets.data.tables import rows_table

    columns = [{"column": name, "rows": rows} for name, rows in statistics["ignored_columns"].items()]
    files = [{"file": name} for name in statistics["ignored_files"]]
    lacking = [
        {"column": column, "files": ", ".join(names)} for column, names in statistics["files_without_column"].items()
    ]
    tables = {
        "ignored_columns": (columns, ["column", "rows"]),
        "ignored_files": (files[:FILES], ["file"]),
        "files_without_column": (lacking, ["column", "files"]),
    }
    counts = {"ignored_file_count": len(files)} if files else {}
    return {**counts, **{key: dg.MetadataValue.md(rows_table(*table)) for key, table in tables.items() if table[0]}}
