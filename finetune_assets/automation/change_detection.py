"""Detection of new raw data: it differs from the last started version, has stopped changing and has enough rows."""

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from finetune_assets.config.raw_data_schema import Arrivals


class Watched(Protocol):
    """Raw data source that is observed repeatedly."""

    def peek(self) -> str:
        """Value that changes whenever the data may have changed; cheap."""

    def version(self) -> str:
        """Value that changes if and only if the derived artifact would change; reads all new data."""

    def rows(self) -> int:
        """Number of rows; reads all new data."""


@dataclass(frozen=True)
class SensorCursor:
    """Result of earlier observations, stored as the sensor's cursor.

    Attributes:
        version: Version that was started last.
        rows: Number of rows in that version, if counted.
        number: Number of started versions. It is part of the run key, because Dagster never runs a key twice and an
            earlier version may return.
        settled: Glance at the data that was processed last; nothing is started while the glance is unchanged.
        glance: Latest glance at data that has changed since.
        since: Time of the first observation of `glance`, in seconds since 1970.
        first: Time of the first observation of data that differs from `version`, in seconds since 1970.
    """

    version: str = ""
    rows: int | None = None
    number: int = 0
    settled: str = ""
    glance: str = ""
    since: float = 0.0
    first: float = 0.0

    @staticmethod
    def read(cursor: str | None) -> "SensorCursor":
        return SensorCursor(**json.loads(cursor)) if cursor else SensorCursor()

    def write(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Observation:
    """Result of an observation.

    Attributes:
        seen: Cursor for the next observation.
        message: Description of the result for the sensor's tick.
        starts: Whether to read the data now.
    """

    seen: SensorCursor
    message: str
    starts: bool = False


def observe(watched: Watched, seen: SensorCursor, settings: Arrivals, now: float) -> Observation:
    """Observe the data once.

    Args:
        watched: Raw data source.
        seen: Cursor of the last observation.
        settings: Debounce time, minimum number of new rows and maximum wait.
        now: Current time, in seconds since 1970.

    Returns:
        The observation, with the cursor for the next one.
    """
    glance = watched.peek()
    if glance == seen.settled:
        return Observation(replace(seen, glance="", first=0.0), "No change")
    if glance != seen.glance:
        seen = replace(seen, glance=glance, since=now, first=seen.first or now)
        return Observation(seen, f"Change detected; waiting for {settings.quiet_seconds:g} s without changes")
    if (still := now - seen.since) < settings.quiet_seconds:
        return Observation(seen, f"Unchanged for {still:.0f} of {settings.quiet_seconds:g} s")
    version = watched.version()
    if version == seen.version:
        return Observation(
            replace(seen, settled=glance, glance="", first=0.0),
            "No content change (files only touched, moved or renamed)",
        )
    rows = watched.rows() if settings.min_new_rows else None
    if (wait := _reason_to_wait(rows, seen, settings, now)) is not None:
        return Observation(seen, wait)
    started = SensorCursor(version, rows, seen.number + 1, settled=glance)
    message = f"New data: version {version[:12]}" + (f", {rows:,} rows" if rows is not None else "")
    return Observation(started, message, starts=True)


def _reason_to_wait(rows: int | None, seen: SensorCursor, settings: Arrivals, now: float) -> str | None:
    if rows is None or seen.rows is None or abs(rows - seen.rows) >= settings.min_new_rows:
        return None
    if now >= (until := seen.first + settings.max_wait_seconds):
        return None
    at = datetime.fromtimestamp(until, UTC)
    return (
        f"{rows - seen.rows:+,} rows (arrivals.min_new_rows = {settings.min_new_rows:,}); will be read by "
        f"{at:%H:%M:%S} UTC"
    )
