"""Sensors that tell a person: of runs that failed, of a budget that is used up, of sensors that have stopped."""

import json
import time
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from finetune_assets.automation import budget, heartbeat
from finetune_assets.automation.alerts import AlertError, configured, link, tell

WILL_RETRY_TAG = "dagster/will_retry"
"""Dagster's own, on a run that failed."""
STATUS = dg.DefaultSensorStatus.RUNNING if configured() else dg.DefaultSensorStatus.STOPPED


@dg.run_failure_sensor(
    name="alert_on_failure",
    minimum_interval_seconds=10,
    default_status=STATUS,
    description="Alerts on each failed run with the worker's own error: a failed training, or a failed blocking "
    "check. Starts automatically once FINETUNE_ALERT_WEBHOOK or FINETUNE_ALERT_EMAIL is set.",
)
def alert_on_failure(context: dg.RunFailureSensorContext) -> None:
    run = context.dagster_run
    partition = run.tags.get("dagster/partition")
    assets = ", ".join(sorted(key.to_user_string() for key in run.asset_selection or ())) or _assets_of(context)
    tell(f"failed: {assets}{f' for {partition}' if partition else ''}", f"{_why(context)}\n{link(run.run_id)}".strip())


def _why(context: dg.RunFailureSensorContext) -> str:
    """Of each step that failed, the error's first cause and no stack trace."""
    told = []
    for event in context.get_step_failure_events():
        data = event.step_failure_data
        if data.user_failure_data and data.user_failure_data.description:
            told.append(f"{event.step_key}: {data.user_failure_data.description}")
        elif data.error:
            told.append(f"{event.step_key}: {data.error.message.strip()}")
    told += [
        f"check {check.check_name} of {check.asset_key.to_user_string()}: {check.description}"
        for check in _failed_checks(context)
    ]
    said = context.failure_event.message or "No step error recorded"
    if not told and "outside the execution context" in said:
        said = "Its process has died: it was killed or ran out of memory"
    again = "\nIt will be retried automatically." if _is_repeated(context) else ""
    return ("\n".join(told) or said) + again


def _is_repeated(context: dg.RunFailureSensorContext) -> bool:
    run = context.instance.get_run_by_id(context.dagster_run.run_id)
    return run is not None and run.tags.get(WILL_RETRY_TAG) == "true"


def _assets_of(context: dg.RunFailureSensorContext) -> str:
    """Those that a run planned to make, where it does not name them; else its job."""
    planned = dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
    logs = context.instance.all_logs(context.dagster_run.run_id, of_type=planned)
    keys = {event.asset_key for entry in logs if (event := entry.get_dagster_event()).asset_key}
    return ", ".join(sorted(key.to_user_string() for key in keys)) or context.dagster_run.job_name


def _failed_checks(context: dg.RunFailureSensorContext) -> list[Any]:
    """Evaluations of the checks that failed in the run."""
    logs = context.instance.all_logs(context.dagster_run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    found = [entry.get_dagster_event().asset_check_evaluation_data for entry in logs]
    return [evaluation for evaluation in found if not evaluation.passed]


@dg.sensor(
    minimum_interval_seconds=60,
    default_status=STATUS,
    description="Alerts once when the daily GPU budget is exhausted, and when a sensor of the graph has not run for "
    "five minutes. Starts automatically once an alert is configured.",
)
def alert_on_standstill(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    told = set(json.loads(context.cursor or "[]"))
    found = {**_empty_budget(context.instance), **heartbeat.silent(time.time())}
    for title in found.keys() - told:
        try:
            tell(title, found[title])
        except AlertError as e:
            context.log.error(str(e))
            del found[title]  # tried again at the next tick
    return dg.SensorResult(skip_reason="; ".join(sorted(found)) or "No alerts", cursor=json.dumps(sorted(found)))


def _empty_budget(instance: dg.DagsterInstance) -> dict[str, str]:
    allowed, now = budget.allowed(), datetime.now(UTC)
    if allowed is None or (used := budget.used_today(instance, now)) < allowed:
        return {}
    title = f"Daily GPU budget of {now:%d %B} exhausted"
    return {title: f"Used {used:.2f} of {allowed:g} GPU-hours (arrivals.gpu_hours_a_day). Training resumes tomorrow."}
