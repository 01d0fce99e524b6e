"""Asset `champion_adapter`: the adapter in production."""

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import CHAMPIONS
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.assets.materialization import ARTIFACT, Outcome, asset_step, lineage_tags, result
from finetune_assets.assets.partitions import check_of_each, project_asset
from finetune_assets.assets.promotion import GATE, Decision, promote_if_better, wandb_metadata
from finetune_assets.automation.conditions import auto_materialize
from finetune_assets.display import code, markdown
from finetune_assets.reporting.page_names import moment
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef


@project_asset(
    CHAMPIONS,
    "pytorch",
    dagster_type=ARTIFACT,
    output_required=False,
    check_specs=[
        check_of_each(
            "champion_adapter",
            GATE,
            "The newest adapter is the champion: it improves on the previous champion (or the base model) beyond noise "
            "and forgets at most gate.max_forgetting. Otherwise the previous champion stays, and the check warns with "
            "the deciding number.",
            blocking=False,
        )
    ],
    automation_condition=auto_materialize("adapter_evaluation", always_made=False),
)
def champion_adapter(
    context: dg.AssetExecutionContext, lora_adapter: ArtifactRef, adapter_evaluation: ArtifactRef, project: Project
) -> Iterator[dg.MaterializeResult[ArtifactRef] | dg.AssetCheckResult]:
    """The adapter in production: the new adapter if it passes the gate, otherwise the previous champion.

    Until an adapter improves on the base model, the experiment has no champion and this asset is not materialized.
    """
    with asset_step(context):
        lineage = project.lineage(context.partition_key)
        decision = promote_if_better(lineage, lora_adapter, adapter_evaluation, by=f"run {context.run.run_id}")
        context.log.info(decision.reason)
        yield from announced(lineage, decision, wandb_metadata(context, lineage, decision))


def announced(
    lineage: Lineage, decision: Decision, metadata: Mapping[str, Any]
) -> Iterator[dg.MaterializeResult[ArtifactRef] | dg.AssetCheckResult]:
    """Yield the materialization and the check result for a decision."""
    if decision.champion is None:
        yield decision.check_result
        return
    history = lineage.champions.history()
    yield result(
        Outcome(decision.champion, not decision.promoted, 0.0),
        [decision.check_result],
        lineage_tags(lineage),
        decision=decision.reason,
        champion=history[-1].number,
        history=dg.MetadataValue.md(table(history)),
        **metadata,
    )


def table(history: list) -> str:  # type: ignore[type-arg]
    """The latest 20 records of a promotion history, newest first, as a Markdown table."""
    rows = [
        f"| {r.number} | {moment(r.at)} | {markdown(r.action)} | {code(r.adapter[:12])} | {markdown(r.reason)} |"
        for r in reversed(history[-20:])
    ]
    return "\n".join(["| record | time (UTC) | action | adapter | reason |", "| --- | --- | --- | --- | --- |", *rows])
