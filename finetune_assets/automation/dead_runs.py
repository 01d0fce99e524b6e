"""Runs whose process is gone count as failed.

The code server that started a run tells of its death, unless it died too; and nobody tells of one of the command line.
Dagster then shows it as started for ever, and what waits for it waits as long.
"""

import json

import dagster as dg

from finetune_assets.resources import alive


@dg.sensor(
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Ends runs of this machine whose process is gone: killed, out of memory, or gone with the machine. One "
    "that Dagster had started is started again, and training goes on from its last checkpoint.",
)
def dead_runs_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """A run must be found dead twice: whoever else knows of it has had time to say so."""
    before, still = set(json.loads(context.cursor or "[]")), []
    for run_id in alive.died():
        run = context.instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            alive.forget(run_id)
        elif run_id in before:
            end(context.instance, run)
            context.log.warning(f"run {run_id} had lost its process")
            alive.forget(run_id)
        else:
            still.append(run_id)
    told = f"looks again at {', '.join(still)}" if still else "every run has its process"
    return dg.SensorResult(skip_reason=told, cursor=json.dumps(still))


def end(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """As failed, so that the daemon starts it again; as canceled where only the command line could."""
    told = "the run's process is gone: it was killed, had no memory left, or its machine was switched off"
    if run.remote_job_origin is None or run.status is dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, told)
    else:
        instance.report_run_failed(run, told)
