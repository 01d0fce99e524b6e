"""Heartbeats of the sensors, by which another sensor detects that one has stopped."""

import time
from pathlib import Path

from finetune_assets.resources import deployment
from finetune_assets.store.modes import make_folders

SILENT_SECONDS = 300


def _folder() -> Path:
    return deployment.cache() / "heartbeats"


def beat(sensor: str) -> None:
    """Record a successful tick of a sensor."""
    folder = _folder()
    make_folders(folder)
    (folder / sensor).touch()


def silent(now: float | None = None) -> dict[str, str]:
    """Alerts for sensors that have ticked before, but not in the last five minutes: text by title."""
    now, alerts = now or time.time(), {}
    for path in sorted(_folder().glob("*")):
        if (seconds := now - path.stat().st_mtime) > SILENT_SECONDS:
            alerts[f"{path.name} has stopped"] = (
                f"Last successful tick: {seconds / 60:.0f} minutes ago. See Automation in Dagster's UI for its status "
                "and its last ticks."
            )
    return alerts
