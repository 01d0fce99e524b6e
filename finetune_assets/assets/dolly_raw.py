"""Asset `dolly_raw`: raw instruction data as one Parquet file with a documented schema."""

import time
from datetime import timedelta
from itertools import islice
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import RAW
from finetune_assets.assets.materialization import ARTIFACT, asset_step, column_schema, result
from finetune_assets.assets.partitions import project_asset
from finetune_assets.assets.pictures import of_rows
from finetune_assets.assets.raw_checks import RAW_CHECKS
from finetune_assets.assets.raw_checks.profile import CATEGORIES, PROFILE, VERSIONS
from finetune_assets.assets.raw_sources import (
    FILES,
    CheckedSources,
    evaluate_checks,
    publish_version,
    read_sources,
)
from finetune_assets.config.raw_data_schema import RawDataConfig
from finetune_assets.resources.project import Project
from finetune_assets.resources.raw_versions import AWAY, GOOD_TAG, SOURCE_TAG, source_tag
from finetune_assets.store.results import Results

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

    All experiments read this asset; each selects its sources, its categories and its fraction of the rows. Invalid rows
    are quarantined in `quarantine.jsonl`, with file, line and reason. With several sources, each has its own version.
    """
    with asset_step(context, retried=True):
        began = time.monotonic()
        raw = project.raw(asks_hub=True)
        sources = read_sources(context, project, raw)
        seconds = time.monotonic() - began
        raw.pins.record()
        checked = evaluate_checks(context, project, raw, sources)
        outcome = publish_version(project, raw, checked.used, seconds)
        tags = {SOURCE_TAG: source_tag(raw.source_name), **({GOOD_TAG: "true"} if checked.good else {})}
        drawn = project.store().cache.derived
        by_source = {name: profile.to_dict() for name, profile in checked.profiles.items()}
        if len(raw.sources) == 1:
            (source,) = sources.values()
            profile = dg.MetadataValue.json(next(iter(by_source.values())))
            metadata = {**_describe(source.statistics, drawn), PROFILE: profile}
        else:
            away = (name for name in raw.sources if name not in sources or sources[name].away)
            metadata = {
                **_describe_several(checked, raw.config, sorted(away), drawn),
                PROFILE: dg.MetadataValue.json(by_source),
            }
        return result(outcome, checked.results, tags, source=raw.source_name, **metadata)


def _describe_several(
    checked: CheckedSources, config: RawDataConfig, away: list[str], drawn: Results
) -> dict[str, object]:
    from finetune_assets.data.raw_schema import RAW_SCHEMA
    from finetune_assets.data.tables import rows_table

    sources = checked.used
    columns = ("source", "rows", "quarantined", "weight", "license", "state", "from")
    rows = [
        {
            "source": name,
            "rows": source.statistics["rows"],
            "quarantined": source.statistics["quarantined"],
            "weight": config.sources[name].weight or "",
            "license": config.sources[name].license,
            "state": f"not read, earlier version: {source.away}"
            if source.away
            else f"earlier version, failed {checked.held_back[name]}"
            if name in checked.held_back
            else "read",
            "from": source.lineage.source_name,
        }
        for name, source in sources.items()
    ]
    rows += [
        {
            **dict.fromkeys(columns, ""),
            "source": name,
            "state": f"left out, failed {checked.held_back[name]}" if name in checked.held_back else "missing",
        }
        for name in config.sources
        if name not in sources
    ]
    of_each = {name: _describe(source.statistics, drawn) for name, source in sources.items()}
    return {
        "dagster/row_count": sum(source.statistics["rows"] for source in sources.values()),
        "dagster/column_schema": column_schema(RAW_SCHEMA),
        "sources": dg.MetadataValue.md(rows_table(rows, columns)),
        **({AWAY: dg.MetadataValue.json(away)} if away else {}),
        VERSIONS: dg.MetadataValue.json({name: source.ref.fingerprint for name, source in sources.items()}),
        **{
            f"{name}: {key}": value
            for name, metadata in of_each.items()
            for key, value in metadata.items()
            if not key.startswith("dagster/")
        },
    }


def _describe(statistics: dict[str, Any], drawn: Results) -> dict[str, object]:
    from finetune_assets.data.raw_schema import RAW_SCHEMA
    from finetune_assets.data.tables import conversations_table, rows_table

    categories = statistics["categories"]
    counts = [{"category": name, "rows": rows} for name, rows in islice(categories.items(), CATEGORIES)]
    conversations = statistics["conversation_preview"]
    return {
        "dagster/row_count": statistics["rows"],
        "dagster/column_schema": column_schema(RAW_SCHEMA),
        "rows_with_context": statistics["with_context"],
        "conversations": statistics["conversations"],
        "quarantined": statistics["quarantined"],
        **of_rows(statistics, drawn),
        **({"category_count": len(categories)} if len(categories) > CATEGORIES else {}),
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
