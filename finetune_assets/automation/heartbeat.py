"""When each sensor did its work last, so that another one can tell that it has stopped."""

import time
from pathlib import Path

from finetune_assets.resources import deployment

SILENT_SECONDS = 300


def _folder() -> Path:
    return deployment.cache() / "heartbeats"


def beat(sensor: str) -> None:
    """Note that a sensor has done its work."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / sensor).touch()


def silent(now: float | None = None) -> dict[str, str]:
    """Sensors that have worked once, and not for five minutes; what to say of each, by its title."""
    now, found = now or time.time(), {}
    for path in sorted(_folder().glob("*")):
        if (seconds := now - path.stat().st_mtime) > SILENT_SECONDS:
            found[f"{path.name} has stopped"] = (
                f"Last successful tick: {seconds / 60:.0f} minutes ago. See Automation in Dagster's UI for its status "
                "and its last ticks."
            )
    return found
