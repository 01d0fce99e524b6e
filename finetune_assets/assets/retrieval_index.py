"""Asset `retrieval_index`: the passages of a document set, and the index that finds them."""

from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts.document_lineage import CONTEXTS, DocumentLineage, contexts_of
from finetune_assets.artifacts.kinds import INDEXES
from finetune_assets.assets.index_checks import SPECS, index_checks
from finetune_assets.assets.materialization import (
    asset_step,
    column_schema,
    materialize_or_reuse,
    publish_built,
    result,
)
from finetune_assets.assets.partitions import project_asset
from finetune_assets.display import shown_url
from finetune_assets.resources.index_versions import DOCUMENTS_TAG, documents_tag
from finetune_assets.resources.project import Project
from finetune_assets.resources.raw_versions import GOOD_TAG
from finetune_assets.store.artifacts import ArtifactRef


@project_asset(
    INDEXES,
    "arrow",
    dagster_type=dg.PythonObjectDagsterType((ArtifactRef, type(None))),  # None: an experiment that retrieves nothing
    deps=["dolly_raw"],  # its contexts may be the documents, and its rows measure the index; a run may leave it out
    check_specs=SPECS,
)
def retrieval_index(context: dg.AssetExecutionContext, project: Project) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """The passages of a document set (`configs/documents/NAME.yaml`), each content once, and the index that finds them.

    Experiments with `data.retrieval` put passages into their training rows, and are evaluated on passages that this
    index retrieves. Its checks measure how often it finds the passage that a row's answer is in. Experiments that
    retrieve from the same set share its index; for one that retrieves nothing, none is built.
    """
    with asset_step(context, retried=True):
        retrieval = project.experiment(context.partition_key).config.data.retrieval
        if retrieval is None:
            skipped = f"Skipped: {context.partition_key} retrieves nothing (data.retrieval)"
            context.log.info(skipped)
            checks = [dg.AssetCheckResult(passed=True, check_name=spec.name, description=skipped) for spec in SPECS]
            return dg.MaterializeResult(value=None, metadata={"index": "none"}, check_results=checks)
        documents = project.documents(retrieval.documents, asks_hub=True)

        def make() -> ArtifactRef:
            made_from = {"documents": documents.name, "source": _shown(documents), "content": documents.short_content}
            name = documents.fingerprint
            return publish_built(project, INDEXES, name, name, made_from, lambda folder: _build(documents, folder))

        outcome = materialize_or_reuse(context, project, INDEXES, documents.fingerprint, make)
        documents.pins.record()
        folder = project.store().fetch(outcome.ref)
        checks, measured = index_checks(context, documents, folder)
        good = all(check.passed or check.severity is dg.AssetCheckSeverity.WARN for check in checks)
        return result(
            outcome,
            checks,
            {DOCUMENTS_TAG: documents_tag(documents.name), **({GOOD_TAG: "true"} if good else {})},
            source=_shown(documents),
            **_describe(folder),
            **measured,
        )


def _shown(documents: DocumentLineage) -> str:
    return shown_url(documents.source_name)


def _build(documents: DocumentLineage, folder: Path) -> None:
    from finetune_assets.data.errors import DataError
    from finetune_assets.retrieval.index import build_index

    build_index(_documents(documents), documents.config, folder, documents.raw.root)
    if not documents.is_unchanged():
        raise DataError(f"document set {documents.name}: documents changed during the read; materialize it again")


def _documents(documents: DocumentLineage) -> Any:
    from finetune_assets.retrieval.documents import Document, read_documents

    if documents.config.from_contexts:
        return (Document(context, CONTEXTS) for context in contexts_of(documents.raw))
    return read_documents(documents.source.files(), documents.config.columns)


def _describe(folder: Path) -> dict[str, object]:
    from finetune_assets.data.tables import rows_table
    from finetune_assets.retrieval.index import read_description
    from finetune_assets.retrieval.passages import PASSAGES

    described = read_description(folder)
    statistics = described["statistics"]
    first = described["preview"]
    return {
        "dagster/row_count": statistics["passages"],
        "dagster/column_schema": column_schema(PASSAGES),
        "index": described["index"]["kind"],
        **{name: value for name, value in statistics.items() if isinstance(value, int) and name != "passages"},
        "mean_words": round(statistics["words"] / max(1, statistics["passages"]), 1),
        "preview": dg.MetadataValue.md(rows_table(first, ["title", "text", "source"])),
    }
