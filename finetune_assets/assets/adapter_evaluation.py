"""What the adapter changed, measured on rows that it was not trained on."""

import json

import dagster as dg

from finetune_assets.assets.making import GROUP, in_run, job, make_once, overridden, result
from finetune_assets.assets.partitions import experiments
from finetune_assets.automation.conditions import by_itself
from finetune_assets.launch.local import LocalLauncher
from finetune_assets.launch.pipes import run_in_pipes
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import EVALUATIONS, ArtifactRef

EVALUATION = "evaluation.json"


@dg.asset(
    group_name=GROUP,
    kinds={"pytorch"},
    partitions_def=experiments,
    code_version="1",
    automation_condition=by_itself("lora_adapter"),
)
def adapter_evaluation(
    context: dg.AssetExecutionContext,
    lora_adapter: ArtifactRef,
    tokenized_dataset: ArtifactRef,
    cached_base_model: ArtifactRef,
    project: Project,
    launcher: dg.ResourceParam[LocalLauncher],
) -> dg.MaterializeResult[ArtifactRef]:
    """Base and adapter on the validation rows: exact match of generated answers, and some side by side."""
    with in_run(context):
        lineage = project.lineage(context.partition_key)
        fingerprint = lineage.evaluation_fingerprint(lora_adapter)

        def make() -> ArtifactRef:
            spec = job(
                project,
                lineage.experiment,
                module="finetune_assets.evaluation",
                inputs={"base-model": cached_base_model, "dataset": tokenized_dataset, "adapter": lora_adapter},
                kind=EVALUATIONS,
                fingerprint=fingerprint,
                made_from={"fingerprint": fingerprint, "lora_adapter": lora_adapter.fingerprint},
            )
            return run_in_pipes(context, launcher, spec)

        made = make_once(context, project, EVALUATIONS, fingerprint, make)
        return result(made, tags=overridden(lineage.experiment), **_describe(project, made.ref))


def _describe(project: Project, ref: ArtifactRef) -> dict[str, object]:
    from finetune_assets.data.preview import rows_table

    evaluation = json.loads((project.store().fetch(ref) / EVALUATION).read_text(encoding="utf-8"))
    samples = rows_table(evaluation["samples"], ["prompt", "expected", "base", "adapter"])
    return {**evaluation["metrics"], "samples": dg.MetadataValue.md(samples)}
