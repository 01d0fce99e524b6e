"""Raw instruction data, as one Parquet file of a documented schema."""

import json
from dataclasses import asdict
from pathlib import Path

import dagster as dg

from finetune_assets.assets.making import GROUP, make_once, plain_errors, publish_built, result
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.lineage import RAW

STATISTICS = "statistics.json"


@dg.asset(group_name=GROUP, kinds={"parquet"}, code_version="1")
def dolly_raw(context: dg.AssetExecutionContext, project: Project) -> dg.MaterializeResult[ArtifactRef]:
    """The deployment's instruction data (`configs/raw_data.yaml`), checked row by row and stored as Parquet.

    One stream of raw data that every experiment reads; an experiment takes its categories and its share of the rows.
    """
    from finetune_assets.data.sources import DataError, write_parquet

    with plain_errors():
        lineage = project.raw()

        def build(folder: Path) -> None:
            statistics = write_parquet(lineage.files, folder)
            if project.raw().fingerprint != lineage.fingerprint:
                raise DataError(f"{lineage.config.source}: the rows changed while they were read; run dolly_raw again")
            (folder / STATISTICS).write_text(json.dumps(asdict(statistics)), encoding="utf-8")

        def make() -> ArtifactRef:
            made_from = {"source": lineage.config.source, "files": [file.name for file in lineage.files]}
            return publish_built(project, RAW, lineage.fingerprint, lineage.fingerprint, made_from, build)

        made = make_once(context, project, RAW, lineage.fingerprint, make)
        return result(made, source=lineage.config.source, **_describe(project, made.ref))


def _describe(project: Project, ref: ArtifactRef) -> dict[str, object]:
    from finetune_assets.data.preview import rows_table

    folder = project.store().fetch(ref, lambda path: path == STATISTICS)
    statistics = json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    counts = [{"category": name, "rows": str(rows)} for name, rows in statistics["categories"].items()]
    return {
        "dagster/row_count": statistics["rows"],
        "rows_with_context": statistics["with_context"],
        "categories": dg.MetadataValue.md(rows_table(counts, ["category", "rows"])),
        "preview": dg.MetadataValue.md(
            rows_table(statistics["preview"], ["instruction", "context", "response", "category"])
        ),
    }
