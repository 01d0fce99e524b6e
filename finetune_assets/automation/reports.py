"""When the page about all experiments is made anew without a human."""

import json
from typing import Any

import dagster as dg

SETTLED_SECONDS = 20.0
"""What follows an evaluation in its run, the champion, is waited for; experiments that end together share a page."""


class NewerInputs(dg.AutomationCondition):  # type: ignore[type-arg]
    """True where an asset before this one was made since this one was, in whatever partition, a while ago.

    What it was asked for with last is remembered, so that one that fails waits for something new.

    Args:
        inputs: Names of the assets before it.
    """

    def __init__(self, *inputs: str) -> None:
        self.inputs = inputs

    @property
    def description(self) -> str:
        return "Upstream evaluation or champion updated since the last request"

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
    """Storage id and time of an asset's newest materialization; zeros where there is none."""
    records = instance.fetch_materializations(dg.AssetKey(asset), limit=1).records
    return (records[0].storage_id, records[0].timestamp) if records else (0, 0.0)


def newer(*inputs: str) -> Any:
    """The condition of an asset without partitions that follows partitioned ones, whichever of them are made."""
    condition = NewerInputs(*inputs) & ~dg.AutomationCondition.in_progress()
    return condition.with_label("Auto-materialize after evaluations")
