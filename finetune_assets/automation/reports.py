"""Automation condition of the report of all experiments."""

import json
from typing import Any

import dagster as dg

SETTLED_SECONDS = 20.0
"""Delay after the newest upstream materialization, in seconds: the champion follows the evaluation in the same run, and
experiments that finish together share one report."""


class NewerInputs(dg.AutomationCondition):  # type: ignore[type-arg]
    """True if any partition of an upstream asset was materialized after this asset, at least `SETTLED_SECONDS` ago.

    The newest input of the last request is remembered, so a failed materialization is repeated only for a newer input.

    Args:
        inputs: Names of the upstream assets.
    """

    def __init__(self, *inputs: str) -> None:
        self.inputs = inputs

    @property
    def description(self) -> str:
        return "Evaluation, champion or served adapter updated since the last request"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        memory = json.loads(context.cursor) if context.cursor else {"asked": 0, "seen": 0}
        requested = context.get_previous_requested_subset(context.root_context.key)
        if requested and not requested.is_empty:
            memory["asked"] = memory["seen"]
        instance = context.asset_graph_view.instance
        newest = max((_newest(instance, name) for name in self.inputs), default=(0, 0.0))
        own, _ = _newest(instance, context.key.to_user_string())
        settled = context.evaluation_time.timestamp() - newest[1] >= SETTLED_SECONDS
        memory["seen"] = newest[0]
        due = newest[0] > max(own, memory["asked"]) and settled
        subset = context.candidate_subset if due else context.get_empty_subset()
        return dg.AutomationResult(context, subset, cursor=json.dumps(memory))


def _newest(instance: dg.DagsterInstance, asset: str) -> tuple[int, float]:
    """Storage id and timestamp of an asset's newest materialization; zeros if it was never materialized."""
    records = instance.fetch_materializations(dg.AssetKey(asset), limit=1).records
    return (records[0].storage_id, records[0].timestamp) if records else (0, 0.0)


def newer(*inputs: str) -> Any:
    """Condition of an unpartitioned asset that follows any materialized partition of its upstream assets."""
    condition = NewerInputs(*inputs) & ~dg.AutomationCondition.in_progress()
    return condition.with_label("Auto-materialize after evaluations")
