"""The adapter in service."""

from collections.abc import Iterator

import dagster as dg

from finetune_assets.artifacts.kinds import CHAMPIONS
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.assets.judging import GATE, Decision, decide
from finetune_assets.assets.making import ARTIFACT, GROUP, Made, in_run, overridden, result
from finetune_assets.assets.partitions import check_of_each, experiments
from finetune_assets.automation.conditions import by_itself
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef


@dg.asset(
    group_name=GROUP,
    kinds={"pytorch"},
    partitions_def=experiments,
    code_version=CHAMPIONS.code_version,
    dagster_type=ARTIFACT,
    output_required=False,
    check_specs=[
        check_of_each(
            "champion_adapter",
            GATE,
            "The newest adapter serves: it beat the one before beyond noise, and has not forgotten too much. "
            "Otherwise the champion stays, and this warns with the number that decided.",
            blocking=False,
        )
    ],
    automation_condition=by_itself("adapter_evaluation"),
)
def champion_adapter(
    context: dg.AssetExecutionContext, lora_adapter: ArtifactRef, adapter_evaluation: ArtifactRef, project: Project
) -> Iterator[dg.MaterializeResult[ArtifactRef] | dg.AssetCheckResult]:
    """The adapter in service: the new one if it beats the one before, which stays otherwise.

    Where nothing has beaten the base yet, there is none, and this asset is not materialized.
    """
    with in_run(context):
        lineage = project.lineage(context.partition_key)
        decision = decide(lineage, lora_adapter, adapter_evaluation, by=f"run {context.run_id}")
        context.log.info(decision.reason)
        yield from announced(lineage, decision)


def announced(
    lineage: Lineage, decision: Decision
) -> Iterator[dg.MaterializeResult[ArtifactRef] | dg.AssetCheckResult]:
    """What the asset tells of a decision."""
    if decision.champion is None:
        yield decision.checked
        return
    history = lineage.champions.history()
    yield result(
        Made(decision.champion, not decision.promoted, 0.0),
        [decision.checked],
        overridden(lineage.experiment),
        decision=decision.reason,
        champion=history[-1].number,
        history=dg.MetadataValue.md(table(history)),
    )


def table(history: list) -> str:  # type: ignore[type-arg]
    """The newest records of a history, newest first, as Markdown."""
    rows = [f"| {r.number} | {r.at} | {r.action} | `{r.adapter[:12]}` | {r.reason} |" for r in reversed(history[-20:])]
    return "\n".join(["| | when | what | adapter | why |", "| --- | --- | --- | --- | --- |", *rows])
