"""Daily budget of GPU-hours for automatic trainings."""

from datetime import UTC, datetime

import dagster as dg

from finetune_assets.config.loading import load_raw_data_config
from finetune_assets.resources import deployment

GPU_HOURS = "gpu_hours"
"""Metadata key of a trained `lora_adapter`: training time multiplied by the number of processes, in hours."""
PAGE = 1_000


def used_today(instance: dg.DagsterInstance, now: datetime) -> float:
    """GPU-hours of the adapters trained since midnight UTC. Failed trainings do not count."""
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey("lora_adapter"), after_timestamp=midnight.timestamp())
    hours, cursor = 0.0, None
    while True:
        page = instance.fetch_materializations(wanted, limit=PAGE, cursor=cursor)
        for record in page.records:
            materialization = record.asset_materialization
            if materialization is not None and GPU_HOURS in materialization.metadata:
                hours += float(materialization.metadata[GPU_HOURS].value)  # type: ignore[arg-type]
        if not page.has_more:
            return hours
        cursor = page.cursor


def allowed() -> float | None:
    """Budget in GPU-hours per day; None for no limit."""
    return load_raw_data_config(deployment.configs(), deployment.raw_data()).arrivals.gpu_hours_a_day


class WithinDailyGpuBudget(dg.AutomationCondition):  # type: ignore[type-arg]
    """True while today's trainings have used less than the budget; further trainings are deferred to the next day."""

    @property
    def description(self) -> str:
        return "Daily GPU budget left (raw_data.yaml: arrivals.gpu_hours_a_day)"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[type-arg]
        budget, subset = allowed(), context.candidate_subset
        if budget is not None and not subset.is_empty:
            used = used_today(context.asset_graph_view.instance, context.evaluation_time)
            if used >= budget:
                context.log.warning(
                    f"Daily GPU budget exhausted (used {used:.2f} of {budget:g} h); training deferred to tomorrow"
                )
                subset = context.get_empty_subset()
        return dg.AutomationResult(context, subset)
