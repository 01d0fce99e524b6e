"""Check `contamination` of `tokenized_dataset`: training rows that contain text which models are evaluated on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts.imports import Import
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.assets.materialization import fraction_check
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import ArtifactRef

NAME, TRAIN = "contamination", "train.arrow"


def contamination_check(
    context: dg.AssetExecutionContext, lineage: Lineage, dolly_raw: ArtifactRef, dataset: ArtifactRef
) -> dg.AssetCheckResult:
    """Search the training rows for the experiment's general text and the files of its lm-eval tasks.

    These texts are no inputs of the dataset, so the search is done at each materialization, also after a cache hit. A
    text that cannot be read fails the check, not the asset.
    """
    from finetune_assets.data.contamination import WORDS, contamination, training_rows
    from finetune_assets.data.ingest import PARQUET

    try:
        named = _texts(lineage)
    except UserError as e:
        context.log.warning(f"Check {NAME} failed: {e}")
        return dg.AssetCheckResult(
            passed=False, check_name=NAME, severity=dg.AssetCheckSeverity.WARN, description=str(e)
        )
    most = lineage.experiment.config.data.checks.max_contaminated_share
    if not named:
        return fraction_check(context, NAME, 0, 0, most, "", dg.AssetCheckSeverity.WARN, texts=0)
    selected, store = lineage.selected_sources(dolly_raw), lineage.store
    used = [*selected.values(), *lineage.replayed(selected)]
    raw = [store.fetch(ref, lambda path: path == PARQUET) / PARQUET for ref in used]
    rows = training_rows(raw, store.fetch(dataset, lambda path: path == TRAIN) / TRAIN)
    found = contamination(rows, [text for _, text in named])
    first = "; ".join(f"row {row} and {named[text][0]}" for row, text in found.first)
    problem = (
        f"contain {WORDS} words in a row of a text that models are evaluated on (data.checks.max_contaminated_share = "
        f"{most:g}). First, by number in dolly_raw: {first}"
    )
    severity = dg.AssetCheckSeverity.WARN
    counts: dict[str, Any] = {"texts": found.texts, "texts_too_short": found.short_texts}
    return fraction_check(
        context, NAME, found.rows, found.searched, most, problem, severity, first_rows=first, **counts
    )


def _texts(lineage: Lineage) -> list[tuple[str, str]]:
    """Name and content of each text that the experiment's models are evaluated on."""
    from finetune_assets.data.contamination import DOCUMENT_SUFFIXES, read_documents
    from finetune_assets.data.texts import SUFFIXES, read_texts

    named: list[tuple[str, str]] = []
    sources: list[tuple[Import | None, tuple[str, ...], Callable[[Path], list[str]]]] = [
        (lineage.general_text(), SUFFIXES, read_texts),
        (lineage.lm_eval_tasks(), DOCUMENT_SUFFIXES, read_documents),
    ]
    for imported, suffixes, read in sources:
        for path in _files(imported) if imported else []:
            if path.suffix in suffixes:
                named += [(f"text {number} of {path.name}", text) for number, text in enumerate(read(path), 1)]
    return named


def _files(imported: Import) -> list[Path]:
    if isinstance(imported.files, Path):
        return sorted(path for path in imported.files.rglob("*") if path.is_file())
    return [*imported.files.values()]
