"""Asset `tokenized_dataset`: the experiment's rows as token sequences ready for training."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from finetune_assets.artifacts import provenance
from finetune_assets.artifacts.aliases import SAME_AS, canonical
from finetune_assets.artifacts.kinds import TOKENIZED
from finetune_assets.artifacts.layout import JUDGED_ADAPTERS
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.assets.contamination import contamination_check
from finetune_assets.assets.dataset_builder import dataset_builder
from finetune_assets.assets.dataset_checks import SPECS, dataset_checks
from finetune_assets.assets.materialization import (
    ARTIFACT,
    asset_step,
    column_schema,
    ignoring_index,
    lineage_tags,
    materialize_or_reuse,
    publish_built,
    result,
    trains_later,
)
from finetune_assets.assets.partitions import project_asset
from finetune_assets.assets.pictures import Pictures, of_tokens
from finetune_assets.assets.prompt_boundary import prompt_boundary_check
from finetune_assets.automation.conditions import HasGoodData, auto_materialize
from finetune_assets.data.processes import in_own_process
from finetune_assets.launch.engines import Launcher
from finetune_assets.resources.project import Project
from finetune_assets.serving.state import served_by_name
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.json_object import read_json

if TYPE_CHECKING:
    from finetune_assets.data.building import Built
    from finetune_assets.data.raw_files import RawPart

STATISTICS, PREVIEW = "statistics.json", "preview.md"
SIZES = ("tokens", "labelled_tokens", "sequences", "fill")
"""Statistics that are shown first."""
UNKNOWN = "unknown"
"""In place of the fingerprint of a served adapter that this store has no record of."""


@project_asset(
    TOKENIZED,
    "arrow",
    dagster_type=ARTIFACT,
    deps=["retrieval_index"],  # read where the settings demand it, by its fingerprint
    check_specs=SPECS,
    automation_condition=auto_materialize(
        "dolly_raw", "cached_base_model", "retrieval_index", only_while=HasGoodData()
    ),
)
def tokenized_dataset(
    context: dg.AssetExecutionContext,
    dolly_raw: ArtifactRef,
    cached_base_model: ArtifactRef,
    project: Project,
    launcher: dg.ResourceParam[Launcher],
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """The experiment's rows: selected, split by content, formatted as prompts, tokenized, masked and packed.

    Reads only the tokenizer files of the base model.
    """
    with asset_step(context):
        lineage = project.lineage(context.partition_key)
        config = lineage.experiment.config
        fingerprint = lineage.fingerprint(TOKENIZED, dolly_raw=dolly_raw, cached_base_model=cached_base_model)

        made_from: dict[str, Any] = {
            "dolly_raw": dolly_raw.fingerprint,
            "cached_base_model": cached_base_model.fingerprint,
        }
        tags = lineage_tags(lineage)
        if lineage.documents:
            made_from["retrieval_index"] = lineage.documents.index().fingerprint
            tags |= ignoring_index(lineage, dolly_raw=dolly_raw, cached_base_model=cached_base_model)

        built: list[Built] = []

        def build(folder: Path) -> None:
            if trains_later(context):
                launcher.prepare(config.launcher)
            builder, parts = dataset_builder(lineage, cached_base_model), _raw_parts(lineage, dolly_raw)
            made = in_own_process(builder.build, parts, folder, torch=builder.needs_torch)
            built.append(made)
            (folder / STATISTICS).write_text(json.dumps(made.statistics), encoding="utf-8")
            (folder / PREVIEW).write_text(made.preview, encoding="utf-8")
            if adapters := made.statistics["adapters"]:
                made_from[JUDGED_ADAPTERS] = _judged_adapters(lineage, adapters)
            made_from.update(_same_as(lineage, folder, dolly_raw, cached_base_model))
            if replayed := lineage.replayed(lineage.selected_sources(dolly_raw)):
                made_from["replayed"] = [ref.fingerprint for ref in replayed]

        def make() -> ArtifactRef:
            return publish_built(project, TOKENIZED, fingerprint, fingerprint, made_from, build)

        outcome = materialize_or_reuse(context, project, TOKENIZED, fingerprint, make)
        folder = project.store().fetch(outcome.ref, lambda path: path in (STATISTICS, PREVIEW))
        statistics = read_json(folder / STATISTICS, f"{TOKENIZED.folder}/{fingerprint}")
        checks = dataset_checks(context, statistics, config.data)
        checks.append(contamination_check(context, lineage, dolly_raw, outcome.ref))
        compared = built[0].prompts if built else None
        checks.append(prompt_boundary_check(context, lineage, dolly_raw, cached_base_model, outcome.ref, compared))
        pictures = of_tokens(statistics, config.data.tokenization.cutoff_len, project.store().cache.derived)
        metadata = _describe(statistics, (folder / PREVIEW).read_text(encoding="utf-8"), pictures)
        metadata |= _describe_judged(lineage, outcome.ref, statistics.get("adapters", {}))
        outcome = replace(outcome, ref=canonical(project.store(), outcome.ref))
        return result(outcome, checks, tags, **metadata, dolly_raw=dolly_raw.fingerprint)


def _raw_parts(lineage: Lineage, raw: ArtifactRef) -> list["RawPart"]:
    """The versions of the sources that the experiment uses, fetched, and then earlier versions to replay."""
    from finetune_assets.data.ingest import PARQUET
    from finetune_assets.data.raw_files import RawPart

    def file(ref: ArtifactRef) -> Path:
        return lineage.store.fetch(ref, lambda path: path == PARQUET) / PARQUET

    selected = lineage.selected_sources(raw)
    mixture: dict[str, Any] = lineage.mixture(selected)
    parts = [RawPart(name, file(ref), **mixture.get(name, {})) for name, ref in selected.items()]
    return parts + [RawPart("replayed", file(ref), replay=True) for ref in lineage.replayed(selected)]


def _judged_adapters(lineage: Lineage, names: Iterable[str]) -> dict[str, str]:
    """Provenance of judged answers: fingerprints of the served adapters that gave them, by name."""
    records = served_by_name(lineage.store, names)
    return {name: records[name].adapter if name in records else UNKNOWN for name in names}


def _describe_judged(lineage: Lineage, dataset: ArtifactRef, judgements: Mapping[str, int]) -> dict[str, object]:
    """Number of judgements and fingerprint by served adapter; empty if no judgement names one."""
    from finetune_assets.data.tables import rows_table

    manifest = lineage.store.manifest(dataset.kind, dataset.name)
    adapters = provenance.texts_by_name(manifest.made_from if manifest else {}, JUDGED_ADAPTERS)
    rows = [
        {"served adapter": name, "judgements": count, "adapter": adapters.get(name, UNKNOWN)}
        for name, count in judgements.items()
    ]
    table = rows_table(rows, ["served adapter", "judgements", "adapter"])
    return {JUDGED_ADAPTERS: dg.MetadataValue.md(table)} if rows else {}


def _same_as(lineage: Lineage, folder: Path, raw: ArtifactRef, base_model: ArtifactRef) -> dict[str, str]:
    """Provenance that names an earlier code version's dataset with the same examples, if the store has one."""
    from finetune_assets.data.same_examples import same_examples

    for earlier in lineage.earlier_fingerprints(TOKENIZED, dolly_raw=raw, cached_base_model=base_model):
        ref = lineage.store.find(TOKENIZED.folder, earlier)
        if ref and same_examples(lineage.store.fetch(ref), folder):
            return {SAME_AS: earlier}
    return {}


def _describe(statistics: dict[str, Any], preview: str, pictures: Pictures) -> dict[str, object]:
    """Metadata: the size of the dataset, what it looks like, and then how its rows were selected."""
    from finetune_assets.data.encoding import example_schema

    counts = dict(statistics)
    examples, lengths = counts.pop("examples"), counts.pop("length_quantiles")
    for name in (
        "first_without_label",
        "first_truncated",
        "first_overlap",
        "first_left_out",
        "first_conflicting",
        "adapters",
        "length_histogram",
        "fill_histogram",
    ):
        counts.pop(name, None)  # shown by the checks and by plots
    passages = counts.pop("passages", {})
    counts |= {f"{split}_{name}": count for split, named in passages.items() for name, count in named.items()}
    counts |= {f"drawn_{split}_rows": rows for split, rows in counts.pop("drawn", {}).items()}
    for name, kind in (("pairs", "pairs"), ("labelled", "labelled_answers")):
        counts |= {f"{split}_{kind}": count for split, count in counts.pop(name, {}).items()}
    counts |= {f"mean_{side}_tokens": mean for side, mean in counts.pop("judged_tokens", {}).items()}
    return {
        "dagster/row_count": sum(examples.values()),
        "dagster/column_schema": column_schema(example_schema(bool(counts["sources"]), bool(passages))),
        **{f"{split}_examples": count for split, count in examples.items()},
        **{name: counts.pop(name) for name in SIZES if name in counts},
        **{f"length_{name}": length for name, length in lengths.items()},
        **pictures,
        "preview": dg.MetadataValue.md(preview),
        **counts,
    }
