"""Raw instruction data, as one Parquet file of a documented schema."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.assets.making import ARTIFACT, GROUP, in_run, make_once, publish_built, result, share_check
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import RAW, ArtifactRef

STATISTICS = "statistics.json"
QUARANTINE_CHECK = "quarantine"


@dg.asset(
    group_name=GROUP,
    kinds={"parquet"},
    code_version="2",
    dagster_type=ARTIFACT,
    check_specs=[
        dg.AssetCheckSpec(
            QUARANTINE_CHECK,
            asset="dolly_raw",
            blocking=True,
            description="The share of bad rows is at most max_quarantine_share (configs/raw_data.yaml).",
        )
    ],
)
def dolly_raw(context: dg.AssetExecutionContext, project: Project) -> dg.MaterializeResult:
    """The deployment's instruction data (`configs/raw_data.yaml`), read row by row and stored as Parquet.

    One stream of raw data that every experiment reads; an experiment takes its categories and its share of the rows.
    Rows that cannot be used are set aside in `quarantine.jsonl`, with file, line and reason.
    """
    from finetune_assets.data.ingest import write_raw
    from finetune_assets.data.sources import DataError

    with in_run(context):
        lineage = project.raw(asks_hub=True)

        def build(folder: Path) -> None:
            statistics = write_raw(lineage.source.files(), lineage.config.columns, folder)
            if not lineage.is_unchanged():
                raise DataError(f"{lineage.config.source}: the rows changed while they were read; run dolly_raw again")
            (folder / STATISTICS).write_text(json.dumps(asdict(statistics)), encoding="utf-8")

        def make() -> ArtifactRef:
            made_from = {"source": lineage.config.source, "content": lineage.content}
            return publish_built(project, RAW, lineage.fingerprint, lineage.fingerprint, made_from, build)

        made = make_once(context, project, RAW, lineage.fingerprint, make)
        lineage.pins.record()
        statistics = _statistics(project, made.ref)
        check = _quarantine_check(context, statistics, lineage.config.max_quarantine_share)
        return result(made, [check], source=lineage.config.source, **_describe(statistics))


def _statistics(project: Project, ref: ArtifactRef) -> dict[str, Any]:
    folder = project.store().fetch(ref, lambda path: path == STATISTICS)
    return json.loads((folder / STATISTICS).read_text(encoding="utf-8"))


def _quarantine_check(
    context: dg.AssetExecutionContext, statistics: dict[str, Any], most: float
) -> dg.AssetCheckResult:
    from finetune_assets.data.preview import rows_table

    first = statistics["first_quarantined"]
    told = "{file}:{line}: {reason}".format(**first[0]) if first else ""
    reasons = [{"reason": reason, "rows": rows} for reason, rows in statistics["reasons"].items()]
    return share_check(
        context,
        QUARANTINE_CHECK,
        statistics["quarantined"],
        statistics["rows"] + statistics["quarantined"],
        most,
        f"are bad and set aside, max_quarantine_share is {most:g}. The first: {told}",
        reasons=dg.MetadataValue.md(rows_table(reasons, ["rows", "reason"])),
        first_rows=dg.MetadataValue.md(rows_table(first, ["file", "line", "reason", "text"])),
    )


def _describe(statistics: dict[str, Any]) -> dict[str, object]:
    from finetune_assets.data.preview import conversations_table, rows_table

    counts = [{"category": name, "rows": rows} for name, rows in statistics["categories"].items()]
    conversations = statistics["conversation_preview"]
    return {
        "dagster/row_count": statistics["rows"],
        "rows_with_context": statistics["with_context"],
        "conversations": statistics["conversations"],
        "quarantined": statistics["quarantined"],
        "categories": dg.MetadataValue.md(rows_table(counts, ["category", "rows"])),
        "preview": dg.MetadataValue.md(
            rows_table(statistics["preview"], ["instruction", "context", "response", "category"])
        ),
        **({"preview_conversations": dg.MetadataValue.md(conversations_table(conversations))} if conversations else {}),
    }
