"""Asset `adapter_evaluation`: evaluates the trained adapter on held-out rows."""

import dagster as dg

from finetune_assets.artifacts.kinds import EVALUATIONS
from finetune_assets.assets.materialization import asset_step, lineage_tags, result
from finetune_assets.assets.partitions import project_asset
from finetune_assets.assets.promotion import evaluate, evaluation_metadata
from finetune_assets.automation.conditions import auto_materialize
from finetune_assets.launch.engines import Launcher
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef


@project_asset(
    EVALUATIONS,
    "pytorch",
    deps=["retrieval_index"],  # read where the settings demand it, by its fingerprint
    automation_condition=auto_materialize("lora_adapter", "retrieval_index"),
)
def adapter_evaluation(
    context: dg.AssetExecutionContext,
    lora_adapter: ArtifactRef,
    tokenized_dataset: ArtifactRef,
    cached_base_model: ArtifactRef,
    project: Project,
    launcher: dg.ResourceParam[Launcher],
) -> dg.MaterializeResult[ArtifactRef]:
    """Evaluation of base model, champion and new adapter on the gate rows: loss by category, answers, forgetting.

    After a change of the documents alone, the champion of an experiment that retrieves is evaluated with the new index.
    """
    from finetune_assets.evaluation.files import read_evaluation

    with asset_step(context):
        lineage = project.lineage(context.partition_key)
        outcome = evaluate(context, project, launcher, lineage, lora_adapter, tokenized_dataset, cached_base_model)
        evaluation = read_evaluation(project.store().fetch(outcome.ref))
        metadata = evaluation_metadata(evaluation, project.store().cache.derived)
        return result(outcome, tags=lineage_tags(lineage), **metadata)
