"""Asset `merged_model`: the champion merged into its base model, for serving without adapters."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import BASE_MODELS, MERGED
from finetune_assets.artifacts.layout import MERGE
from finetune_assets.assets.materialization import (
    ARTIFACT,
    asset_step,
    check_skipped,
    job,
    lineage_tags,
    materialize_or_reuse,
    result,
)
from finetune_assets.assets.partitions import check_of_each, project_asset
from finetune_assets.assets.promotion import base_of
from finetune_assets.automation.conditions import auto_materialize
from finetune_assets.config.schema import Merge
from finetune_assets.launch.engines import Launcher
from finetune_assets.launch.pipes import run_in_pipes
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.json_object import read_json

ROUNDING = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.02}
"""Mean logit difference that rounding explains, as a fraction of the logits' spread. Measured on the packaged model:
5e-7 in float32, 0.5% in bfloat16; 7% for an adapter trained on nf4 and merged into the published weights."""
OF_INT8 = 0.02
"""The same for an int8 base: an int8 layer also rounds its input, a merged model does not (0.7% in float32)."""
OF_GGUF = {"f16": 0.02, "bf16": 0.02, "q8_0": 0.05}
"""The same for GGUF files, by format. Measured on the packaged model: at most 0.5% in 16 bits, 1.2% in 8 bits."""


@project_asset(
    MERGED,
    "pytorch",
    dagster_type=ARTIFACT,
    output_required=False,
    automation_condition=auto_materialize("champion_adapter", always_made=False),
    check_specs=[
        check_of_each(
            "merged_model",
            "merge",
            "On held-out rows, the merged model reproduces the logits of base model and adapter: their mean difference "
            "is at most merge.max_difference. So does each GGUF file, within merge.gguf_max_difference.",
        )
    ],
)
def merged_model(
    context: dg.AssetExecutionContext,
    champion_adapter: ArtifactRef,
    tokenized_dataset: ArtifactRef,
    project: Project,
    launcher: dg.ResourceParam[Launcher],
) -> Iterator[dg.MaterializeResult[ArtifactRef] | dg.AssetCheckResult]:
    """The champion's base model with the adapter's updates merged into its weights, loadable as a regular model.

    Materialized only for experiments with `merge` settings, because the merged model is as large as the base model.
    """
    with asset_step(context, retried=True):
        lineage = project.lineage(context.partition_key)
        settings = lineage.experiment.config.merge
        if settings is None:
            yield check_skipped(context, "merge", f"experiment {lineage.experiment.name} has no `merge` settings")
            return
        fingerprint = lineage.fingerprint(MERGED, champion_adapter=champion_adapter)

        def make() -> ArtifactRef:
            base_model = base_of(lineage, champion_adapter) or lineage.expected(BASE_MODELS)
            spec = job(
                project,
                lineage.experiment,
                module="finetune_assets.merging",
                inputs={"base-model": base_model, "adapter": champion_adapter, "dataset": tokenized_dataset},
                kind=MERGED.folder,
                fingerprint=fingerprint,
                made_from={
                    "fingerprint": fingerprint,
                    "experiment": lineage.experiment.name,
                    "champion_adapter": champion_adapter.fingerprint,
                    "cached_base_model": base_model.fingerprint,
                },
            )
            return run_in_pipes(context, launcher, spec)

        outcome = materialize_or_reuse(context, project, MERGED, fingerprint, make)
        folder = project.store().fetch(outcome.ref, lambda path: path == MERGE)
        comparison = read_json(folder / MERGE, f"{MERGED.folder}/{fingerprint}")
        check = _merge_check(context, comparison, settings)
        yield result(outcome, [check], lineage_tags(lineage), **comparison)


def _merge_check(context: dg.AssetExecutionContext, comparison: dict[str, Any], settings: Merge) -> dg.AssetCheckResult:
    rounding = OF_INT8 if comparison["quantization"] == "int8" else ROUNDING[comparison["dtype"]]
    most = rounding if settings.max_difference is None else settings.max_difference
    message = (
        f"Mean logit difference on {comparison['rows']} held-out rows: {comparison['mean']:.2e}, "
        f"{comparison['share']:.3%} of the logits' spread (limit {most:.3%}, merge.max_difference); "
        f"largest difference: {comparison['largest']:.2e}"
    )
    passed = comparison["share"] <= most
    for kind, difference in comparison.get("gguf", {}).items():
        limit = OF_GGUF[kind] if settings.gguf_max_difference is None else settings.gguf_max_difference
        message += f"; model-{kind}.gguf: {difference['share']:.3%} (limit {limit:.3%}, merge.gguf_max_difference)"
        passed = passed and difference["share"] <= limit
    if not passed:
        context.log.error(f"Check merge failed: {message}")
    return dg.AssetCheckResult(
        passed=passed, check_name="merge", description=message, metadata={**comparison, "threshold": most}
    )
