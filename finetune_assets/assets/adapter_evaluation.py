"""What the adapter changed, measured on rows that nothing was chosen by."""

import dagster as dg

from finetune_assets.artifacts.kinds import EVALUATIONS
from finetune_assets.assets.promotion import evaluation_metadata, evaluate
from finetune_assets.assets.materialization import GROUP, asset_step, overridden, result
from finetune_assets.assets.partitions import experiments
from finetune_assets.automation.conditions import auto_materialize
from finetune_assets.launch.engines import Launcher
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef


@dg.asset(
    group_name=GROUP,
    kinds={"pytorch"},
    partitions_def=experiments,
    code_version=EVALUATIONS.code_version,
    automation_condition=auto_materialize("lora_adapter"),
)
def adapter_evaluation(
    context: dg.AssetExecutionContext,
    lora_adapter: ArtifactRef,
    tokenized_dataset: ArtifactRef,
    cached_base_model: ArtifactRef,
    project: Project,
    launcher: dg.ResourceParam[Launcher],
) -> dg.MaterializeResult[ArtifactRef]:
    """Base, champion and new adapter on the gate's rows: loss by category, generated answers, what is forgotten."""
    from finetune_assets.evaluation.files import read_evaluation

    with asset_step(context):
        lineage = project.lineage(context.partition_key)
        made = evaluate(context, project, launcher, lineage, lora_adapter, tokenized_dataset, cached_base_model)
        evaluation = read_evaluation(project.store().fetch(made.ref))
        return result(made, tags=overridden(lineage.experiment), **evaluation_metadata(evaluation))
