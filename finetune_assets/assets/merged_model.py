"""The champion merged into its base, for whoever serves without adapters."""

import json
from collections.abc import Iterator
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import BASE_MODELS, MERGED
from finetune_assets.artifacts.layout import MERGE
from finetune_assets.assets.promotion import base_of
from finetune_assets.assets.materialization import ARTIFACT, GROUP, asset_step, job, materialize_or_reuse, check_skipped, overridden, result
from finetune_assets.assets.partitions import check_of_each, experiments
from finetune_assets.automation.conditions import auto_materialize
from finetune_assets.config.schema import Merge
from finetune_assets.launch.engines import Launcher
from finetune_assets.launch.pipes import run_in_pipes
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef

ROUNDING = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.02}
"""Mean difference of logits that rounding explains, as a share of their spread. Measured on the packaged model: 5e-7 in
float32, 0.5% in bfloat16; an adapter trained over nf4 and merged into the published weights, 7%."""
OF_INT8 = 0.02
"""An int8 layer rounds its input too, which no merged model does: 0.7% in float32."""


@dg.asset(
    group_name=GROUP,
    kinds={"pytorch"},
    partitions_def=experiments,
    code_version=MERGED.code_version,
    dagster_type=ARTIFACT,
    output_required=False,
    automation_condition=auto_materialize("champion_adapter"),
    check_specs=[
        check_of_each(
            "merged_model",
            "merge",
            "On held-out rows the merged model computes what base and adapter do: the mean difference of the logits is "
            "at most merge.max_difference.",
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
    """The champion's base with the adapter's updates in its weights: a model that loads as any other.

    Only where the experiment has a group `merge`, as it is as large as the base.
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

        made = materialize_or_reuse(context, project, MERGED, fingerprint, make)
        folder = project.store().fetch(made.ref, lambda path: path == MERGE)
        found = json.loads((folder / MERGE).read_text(encoding="utf-8"))
        check = _checked(context, found, settings)
        yield result(made, [check], overridden(lineage.experiment), **found)


def _checked(context: dg.AssetExecutionContext, found: dict[str, Any], settings: Merge) -> dg.AssetCheckResult:
    rounding = OF_INT8 if found["quantization"] == "int8" else ROUNDING[found["dtype"]]
    most = rounding if settings.max_difference is None else settings.max_difference
    told = (
        f"the logits of {found['rows']} held-out rows differ by {found['mean']:.2e} on average, which is "
        f"{found['share']:.3%} of their spread (at most {most:.3%} may be), and by {found['largest']:.2e} at most"
    )
    passed = found["share"] <= most
    if not passed:
        context.log.error(f"Check merge failed: {told}")
    return dg.AssetCheckResult(
        passed=passed, check_name="merge", description=told, metadata={**found, "threshold": most}
    )
