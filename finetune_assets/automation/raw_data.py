"""Automatic materialization of `dolly_raw`: a sensor that watches the source, and a schedule for sources that are
better read at fixed times."""

import time
from typing import Any

import dagster as dg

from finetune_assets.automation import heartbeat
from finetune_assets.automation.change_detection import Observation, SensorCursor, observe
from finetune_assets.automation.experiments import EACH_TIME
from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project

DOLLY_RAW = dg.AssetSelection.assets("dolly_raw")
VERSION_TAG = "finetune/raw_version"


@dg.sensor(
    target=DOLLY_RAW,
    minimum_interval_seconds=EACH_TIME,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Watches the raw data source (configs/raw_data.yaml) every five seconds and materializes `dolly_raw` "
    "once for each new version. Subscribed experiments follow. Tick details show what changed; configure debounce and "
    "batch size under `arrivals` in raw_data.yaml.",
)
def raw_data_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    seen = SensorCursor.read(context.cursor)
    try:
        observation = observe_source(seen)
    except UserError as e:
        context.log.warning(str(e))
        return dg.SensorResult(skip_reason=f"Not started: {e}", cursor=seen.write())
    heartbeat.beat("raw_data_sensor")
    return _sensor_result(observation)


def observe_source(seen: SensorCursor) -> Observation:
    raw = Project().raw(asks_hub=True)
    return observe(raw, seen, raw.config.arrivals, time.time())


def _sensor_result(observation: Observation) -> dg.SensorResult:
    cursor = observation.seen.write()
    if not observation.starts:
        return dg.SensorResult(skip_reason=observation.message, cursor=cursor)
    version = observation.seen.version
    request: Any = dg.RunRequest(run_key=f"{observation.seen.number}-{version}", tags={VERSION_TAG: version[:12]})
    return dg.SensorResult(run_requests=[request], cursor=cursor)


@dg.schedule(
    cron_schedule="0 * * * *",
    target=DOLLY_RAW,
    description="Reads the raw data every hour, for sources that the sensor cannot watch. Unchanged data starts "
    "nothing else. Off by default.",
)
def raw_data_schedule() -> dg.RunRequest:
    return dg.RunRequest()
