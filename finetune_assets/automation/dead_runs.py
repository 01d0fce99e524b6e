"""Sensor that ends runs after their process has died.

The code server that started a run reports the death of its process, unless the server died too. Runs of the command
line are not monitored at all. Dagster shows such runs as started indefinitely, and dependent runs wait just as long.
"""

import json

import dagster as dg

from finetune_assets.resources import run_liveness


@dg.sensor(
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Marks runs as failed when their process on this host has died (killed, out of memory, reboot). Runs "
    "that Dagster started are retried and resume from their last checkpoint.",
)
def dead_runs_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """End a run that is dead on two consecutive ticks, which leaves its code server time to report it first."""
    before, still = set(json.loads(context.cursor or "[]")), []
    for run_id in run_liveness.dead_run_ids():
        run = context.instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            run_liveness.remove_run_lock(run_id)
        elif run_id in before:
            end(context.instance, run)
            context.log.warning(f"Run {run_id}: its process has died")
            run_liveness.remove_run_lock(run_id)
        else:
            still.append(run_id)
    message = f"Re-checking {', '.join(still)}" if still else "All runs alive"
    return dg.SensorResult(skip_reason=message, cursor=json.dumps(still))


def end(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Mark a run as failed, so that the daemon retries it; as canceled if it is canceling or of the command line."""
    message = "The run's process has died: it was killed, ran out of memory, or its host went down"
    if run.remote_job_origin is None or run.status is dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, message)
    else:
        instance.report_run_failed(run, message)
