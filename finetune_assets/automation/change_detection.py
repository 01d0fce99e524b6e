"""When raw data counts as new: it is not what was started last, has stopped growing, and is enough."""

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from finetune_assets.config.schema import Arrivals


class Watched(Protocol):
    """Raw data that is looked at again and again."""

    def glance(self) -> str:
        """Changes whenever the data may have changed; cheap."""

    def version(self) -> str:
        """Changes if and only if what would be made of the data changes; reads all of what is new."""

    def rows(self) -> int:
        """How many rows there are; reads all of what is new."""


@dataclass(frozen=True)
class Seen:
    """What earlier looks found; a sensor's cursor.

    Attributes:
        version: What was started last.
        rows: Rows it had, where that was counted.
        number: How many were started. Versions come back, and Dagster never runs one key twice.
        settled: The glance at which there was nothing to start.
        glance: The glance at data that has changed since.
        since: When that glance was first had, in seconds since 1970.
        first: When the data was first seen to differ from what was started last.
    """

    version: str = ""
    rows: int | None = None
    number: int = 0
    settled: str = ""
    glance: str = ""
    since: float = 0.0
    first: float = 0.0

    @staticmethod
    def read(cursor: str | None) -> "Seen":
        return Seen(**json.loads(cursor)) if cursor else Seen()

    def write(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Look:
    """What a look led to.

    Attributes:
        seen: For the next look.
        told: What was found, for people.
        starts: Whether the data is to be read now.
    """

    seen: Seen
    told: str
    starts: bool = False


def look(watched: Watched, seen: Seen, settings: Arrivals, now: float) -> Look:
    """Look at the data once.

    Args:
        watched: The data.
        seen: What the last look found.
        settings: How long to wait, and for how much.
        now: Seconds since 1970.
    """
    glance = watched.glance()
    if glance == seen.settled:
        return Look(replace(seen, glance="", first=0.0), "No change")
    if glance != seen.glance:
        seen = replace(seen, glance=glance, since=now, first=seen.first or now)
        return Look(seen, f"Change detected; waiting for {settings.quiet_seconds:g} s without changes")
    if (still := now - seen.since) < settings.quiet_seconds:
        return Look(seen, f"Unchanged for {still:.0f} of {settings.quiet_seconds:g} s")
    version = watched.version()
    if version == seen.version:
        return Look(
            replace(seen, settled=glance, glance="", first=0.0),
            "No content change (files only touched, moved or renamed)",
        )
    rows = watched.rows() if settings.min_new_rows else None
    if (wait := _waits_for_more(rows, seen, settings, now)) is not None:
        return Look(seen, wait)
    started = Seen(version, rows, seen.number + 1, settled=glance)
    told = f"New data: version {version[:12]}" + (f", {rows:,} rows" if rows is not None else "")
    return Look(started, told, starts=True)


def _waits_for_more(rows: int | None, seen: Seen, settings: Arrivals, now: float) -> str | None:
    if rows is None or seen.rows is None or abs(rows - seen.rows) >= settings.min_new_rows:
        return None
    if now >= (until := seen.first + settings.max_wait_seconds):
        return None
    at = datetime.fromtimestamp(until, UTC)
    return (
        f"{rows - seen.rows:+,} rows (arrivals.min_new_rows = {settings.min_new_rows:,}); will be read by "
        f"{at:%H:%M:%S} UTC"
    )
