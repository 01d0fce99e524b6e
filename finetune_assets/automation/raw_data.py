"""Automatic materialization of `dolly_raw`: a sensor that watches the source, and a schedule for sources that are
better read at fixed times."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg

from finetune_assets.automation import heartbeat
from finetune_assets.automation.change_detection import Observation, SensorCursor, observe
from finetune_assets.automation.experiments import EACH_TIME
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project

DOLLY_RAW = dg.AssetSelection.assets("dolly_raw")
VERSION_TAG = "finetune/raw_version"


@dg.sensor(
    target=DOLLY_RAW,
    minimum_interval_seconds=EACH_TIME,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Watches each raw data source (configs/raw_data.yaml) every five seconds and materializes `dolly_raw` "
    "once for each new version. Subscribed experiments follow. Tick details show what changed; configure debounce and "
    "batch size under `arrivals` in raw_data.yaml.",
)
def raw_data_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    try:
        raw = Project().raw(asks_hub=True)
    except UserError as e:
        return _not_started(context, e)
    seen, observations = read_cursor(context.cursor, [*raw.sources]), {}
    for name, source in raw.sources.items():
        try:
            observations[name] = observe(source, seen[name], raw.config.arrivals, time.time())
        except UserError as e:  # of this source alone; the others are still watched
            if len(seen) == 1:
                return _not_started(context, e)
            context.log.warning(str(e))
            observations[name] = Observation(seen[name], f"not read: {e}")
    heartbeat.beat("raw_data_sensor")
    return _sensor_result(observations)


def _not_started(context: dg.SensorEvaluationContext, error: UserError) -> dg.SensorResult:
    context.log.warning(str(error))
    return dg.SensorResult(skip_reason=f"Not started: {error}", cursor=context.cursor)


def read_cursor(cursor: str | None, sources: Sequence[str]) -> dict[str, SensorCursor]:
    """Results of earlier observations by source. A single source has the whole cursor."""
    stored = json.loads(cursor) if cursor else {}
    if len(sources) == 1 and "sources" not in stored:
        return {sources[0]: SensorCursor(**stored)}
    known = stored.get("sources", {})
    return {name: SensorCursor(**known.get(name, {})) for name in sources}


def write_cursor(seen: Mapping[str, SensorCursor]) -> str:
    if len(seen) == 1:
        return next(iter(seen.values())).write()
    return json.dumps({"sources": {name: asdict(cursor) for name, cursor in seen.items()}})


def _sensor_result(observations: Mapping[str, Observation]) -> dg.SensorResult:
    seen = {name: observation.seen for name, observation in observations.items()}
    cursor, several = write_cursor(seen), len(seen) > 1
    if not any(observation.starts for observation in observations.values()):
        messages = (f"{name}: {o.message}" if several else o.message for name, o in observations.items())
        return dg.SensorResult(skip_reason="; ".join(messages), cursor=cursor)
    number = sum(one.number for one in seen.values())
    versions = {name: one.version for name, one in seen.items()}
    version = fingerprint(sources=versions) if several else next(iter(versions.values()))
    request: Any = dg.RunRequest(run_key=f"{number}-{version}", tags={VERSION_TAG: version[:12]})
    return dg.SensorResult(run_requests=[request], cursor=cursor)


@dg.schedule(
    cron_schedule="0 * * * *",
    target=DOLLY_RAW,
    description="Reads the raw data every hour, for sources that the sensor cannot watch. Unchanged data starts "
    "nothing else. Off by default.",
)
def raw_data_schedule() -> dg.RunRequest:
    return dg.RunRequest()
