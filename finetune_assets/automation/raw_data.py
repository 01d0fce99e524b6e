"""Automatic materialization of `dolly_raw`: a sensor that watches the source, and a schedule for sources that are
better read at fixed times."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import dagster as dg

from finetune_assets.automation import heartbeat
from finetune_assets.automation.change_detection import SensorCursor, observe
from finetune_assets.automation.experiments import EACH_TIME
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project
from finetune_assets.resources.raw_versions import AWAY

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
    memory = SourcesCursor.read(context.cursor, [*raw.sources])
    messages, starts = {}, False
    for name, source in raw.sources.items():
        try:
            observation = observe(source, memory.sources[name], raw.config.arrivals, time.time())
        except UserError as e:  # of this source alone; the others are still watched
            if len(raw.sources) == 1:
                return _not_started(context, e)
            context.log.warning(str(e))
            messages[name] = f"not read: {e}"
            continue
        memory.sources[name], messages[name] = observation.seen, observation.message
        starts |= observation.starts
    heartbeat.beat("raw_data_sensor")
    settled = {name for name, seen in memory.sources.items() if seen.settled and not seen.glance}
    origin = "; ".join(f"{name}={source.source_name}" for name, source in sorted(raw.sources.items()))
    if starts or settled >= raw.sources.keys():
        starts |= memory.origin not in ("", origin)
        memory.origin = origin
    if len(raw.sources) > 1:
        starts |= memory.count_away(context.instance, settled)
    return _sensor_result(memory, messages, starts)


@dataclass
class SourcesCursor:
    """Results of earlier observations, stored as the sensor's cursor.

    Attributes:
        sources: The result of each source, by name.
        origin: Names and locations of the sources at the last start; a change starts a run.
        started: Number of started runs, of which each has its own key: Dagster never runs a key twice.
        handled: Storage id of the last materialization of `dolly_raw` that used an earlier version of a source, and was
            followed by a start once the source was available again.
    """

    sources: dict[str, SensorCursor]
    origin: str = ""
    started: int = 0
    handled: int = 0

    @staticmethod
    def read(cursor: str | None, names: Sequence[str]) -> "SourcesCursor":
        """Parse a cursor, also one of an earlier version, which was that of a single source."""
        stored = json.loads(cursor) if cursor else {}
        if "sources" not in stored:
            single = SensorCursor(**stored)
            return SourcesCursor(dict.fromkeys(names, SensorCursor()) | {names[0]: single}, started=single.number)
        known = stored.pop("sources")
        return SourcesCursor({name: SensorCursor(**known.get(name, {})) for name in names}, **stored)

    def write(self) -> str:
        return json.dumps(asdict(self))

    def count_away(self, instance: dg.DagsterInstance, settled: set[str]) -> bool:
        """Whether a source is available again that the newest materialization had to replace by an earlier version."""
        records = instance.fetch_materializations(dg.AssetKey("dolly_raw"), limit=1).records
        materialization = records[0].asset_materialization if records else None
        if not materialization or AWAY not in materialization.metadata or records[0].storage_id <= self.handled:
            return False
        away: Any = materialization.metadata[AWAY].value
        if not settled.issuperset(away):
            return False
        self.handled = records[0].storage_id
        return True


def _not_started(context: dg.SensorEvaluationContext, error: UserError) -> dg.SensorResult:
    context.log.warning(str(error))
    return dg.SensorResult(skip_reason=f"Not started: {error}", cursor=context.cursor)


def _sensor_result(memory: SourcesCursor, messages: Mapping[str, str], starts: bool) -> dg.SensorResult:
    several = len(messages) > 1
    if not starts:
        reasons = (f"{name}: {message}" if several else message for name, message in messages.items())
        return dg.SensorResult(skip_reason="; ".join(reasons), cursor=memory.write())
    memory.started += 1
    versions = {name: seen.version for name, seen in memory.sources.items()}
    version = fingerprint(sources=versions) if several else next(iter(versions.values()))
    request: Any = dg.RunRequest(run_key=f"{memory.started}-{version}", tags={VERSION_TAG: version[:12]})
    return dg.SensorResult(run_requests=[request], cursor=memory.write())


@dg.schedule(
    cron_schedule="0 * * * *",
    target=DOLLY_RAW,
    description="Reads the raw data every hour, for sources that the sensor cannot watch. Unchanged data starts "
    "nothing else. Off by default.",
)
def raw_data_schedule() -> dg.RunRequest:
    return dg.RunRequest()
