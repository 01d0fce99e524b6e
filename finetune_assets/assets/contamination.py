"""Check `contamination` of `tokenized_dataset`: training rows that contain text which models are evaluated on."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from finetune_assets import data
from finetune_assets.artifacts.imports import Import
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.assets.materialization import fraction_check
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.results import code_and_libraries

if TYPE_CHECKING:
    from finetune_assets.data.contamination import Contamination

NAME, TRAIN = "contamination", "train.arrow"
FIELDS = {"rows", "first", "texts", "short_texts", "searched"}


def contamination_check(
    context: dg.AssetExecutionContext, lineage: Lineage, dolly_raw: ArtifactRef, dataset: ArtifactRef
) -> dg.AssetCheckResult:
    """Search the training rows for the experiment's general text and the files of its lm-eval tasks.

    These texts are no inputs of the dataset, so they are looked at in each materialization, also after a cache hit; a
    machine searches the rows of a dataset for the same texts once. A text that cannot be read fails the check, not the
    asset.
    """
    from finetune_assets.data.contamination import WORDS

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
    texts = [text for _, text in named]
    question = {
        NAME: dataset.fingerprint,
        "content": dataset.content,
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        **code_and_libraries((Path(data.__file__).parent,), ("numpy", "pyarrow")),
    }
    derived = lineage.store.cache.derived
    found = derived.get(question, FIELDS)
    if found is None:
        found = asdict(_search(lineage, dolly_raw, dataset, texts))
        derived.put(question, found)
    first = "; ".join(f"row {row} and {named[text][0]}" for row, text in found["first"])
    problem = (
        f"contain {WORDS} words in a row of a text that models are evaluated on (data.checks.max_contaminated_share = "
        f"{most:g}). First, by number in dolly_raw: {first}"
    )
    severity = dg.AssetCheckSeverity.WARN
    counts: dict[str, Any] = {"texts": found["texts"], "texts_too_short": found["short_texts"]}
    return fraction_check(
        context, NAME, found["rows"], found["searched"], most, problem, severity, first_rows=first, **counts
    )


def _search(lineage: Lineage, dolly_raw: ArtifactRef, dataset: ArtifactRef, texts: list[str]) -> "Contamination":
    from finetune_assets.data.contamination import contamination, training_rows
    from finetune_assets.data.ingest import PARQUET

    selected, store = lineage.selected_sources(dolly_raw), lineage.store
    used = [*selected.values(), *lineage.replayed(selected)]
    raw = [store.fetch(ref, lambda path: path == PARQUET) / PARQUET for ref in used]
    return contamination(training_rows(raw, store.fetch(dataset, lambda path: path == TRAIN) / TRAIN), texts)


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
