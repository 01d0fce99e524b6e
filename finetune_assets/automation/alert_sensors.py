"""Sensors that send alerts: for failed runs, for an exhausted GPU budget and for stopped sensors."""

import json
import time
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from finetune_assets.automation import budget, heartbeat
from finetune_assets.automation.alerts import AlertError, configured, link, problems, send_alert

WILL_RETRY_TAG = "dagster/will_retry"
"""Dagster's tag on a failed run: whether the run will be retried."""
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
    send_alert(
        f"failed: {assets}{f' for {partition}' if partition else ''}", f"{_why(context)}\n{link(run.run_id)}".strip()
    )


def _why(context: dg.RunFailureSensorContext) -> str:
    """First cause of each failed step, without stack trace, and each failed check."""
    causes = []
    for event in context.get_step_failure_events():
        data = event.step_failure_data
        if data.user_failure_data and data.user_failure_data.description:
            causes.append(f"{event.step_key}: {data.user_failure_data.description}")
        elif data.error:
            causes.append(f"{event.step_key}: {data.error.message.strip()}")
    causes += [
        f"check {check.check_name} of {check.asset_key.to_user_string()}: {check.description}"
        for check in _failed_checks(context)
    ]
    message = context.failure_event.message or "No step error recorded"
    if not causes and "outside the execution context" in message:
        message = "Its process has died: it was killed or ran out of memory"
    retry_note = "\nIt will be retried automatically." if _will_be_retried(context) else ""
    return ("\n".join(causes) or message) + retry_note


def _will_be_retried(context: dg.RunFailureSensorContext) -> bool:
    run = context.instance.get_run_by_id(context.dagster_run.run_id)
    return run is not None and run.tags.get(WILL_RETRY_TAG) == "true"


def _assets_of(context: dg.RunFailureSensorContext) -> str:
    """Assets that a run without an explicit selection planned to materialize; its job name if it planned none."""
    planned = dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
    logs = context.instance.all_logs(context.dagster_run.run_id, of_type=planned)
    keys = {event.asset_key for entry in logs if (event := entry.get_dagster_event()).asset_key}
    return ", ".join(sorted(key.to_user_string() for key in keys)) or context.dagster_run.job_name


def _failed_checks(context: dg.RunFailureSensorContext) -> list[Any]:
    """Evaluations of the run's failed checks."""
    logs = context.instance.all_logs(context.dagster_run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    evaluations = [entry.get_dagster_event().asset_check_evaluation_data for entry in logs]
    return [evaluation for evaluation in evaluations if not evaluation.passed]


@dg.sensor(
    minimum_interval_seconds=60,
    default_status=STATUS,
    description="Alerts once when the daily GPU budget is exhausted, and when a sensor of the graph has not run for "
    "five minutes. Starts automatically once an alert is configured.",
)
def alert_on_standstill(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    for problem in problems():
        context.log.error(problem)  # before the first alert is lost
    already_sent = set(json.loads(context.cursor or "[]"))
    active = {**_exhausted_budget(context.instance), **heartbeat.silent(time.time())}
    for title in active.keys() - already_sent:
        try:
            send_alert(title, active[title])
        except AlertError as e:
            context.log.error(str(e))
            del active[title]  # retried at the next tick
    return dg.SensorResult(skip_reason="; ".join(sorted(active)) or "No alerts", cursor=json.dumps(sorted(active)))


def _exhausted_budget(instance: dg.DagsterInstance) -> dict[str, str]:
    allowed, now = budget.allowed(), datetime.now(UTC)
    if allowed is None or (used := budget.used_today(instance, now)) < allowed:
        return {}
    title = f"Daily GPU budget of {now:%d %B} exhausted"
    return {title: f"Used {used:.2f} of {allowed:g} GPU-hours (arrivals.gpu_hours_a_day). Training resumes tomorrow."}
