"""Runs whose process is gone count as failed.

The code server that started a run tells of its death, unless it died too; and nobody tells of one of the command line.
Dagster then shows it as started for ever, and what waits for it waits as long.
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
    """A run must be found dead twice: whoever else knows of it has had time to say so."""
    before, still = set(json.loads(context.cursor or "[]")), []
    for run_id in run_liveness.died():
        run = context.instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            run_liveness.forget(run_id)
        elif run_id in before:
            end(context.instance, run)
            context.log.warning(f"Run {run_id}: its process has died")
            run_liveness.forget(run_id)
        else:
            still.append(run_id)
    told = f"Re-checking {', '.join(still)}" if still else "All runs alive"
    return dg.SensorResult(skip_reason=told, cursor=json.dumps(still))


def end(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """As failed, so that the daemon starts it again; as canceled where only the command line could."""
    told = "The run's process has died: it was killed, ran out of memory, or its host went down"
    if run.remote_job_origin is None or run.status is dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, told)
    else:
        instance.report_run_failed(run, told)
