"""What earlier trainings in the store were like, and what they were expected to be."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.artifacts.layout import PLAN, TRAINER_STATE
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import MANIFEST, ArtifactRef, ArtifactStore

LOOKED_BACK = 20


def trainer_states(store: ArtifactStore, newest: int = LOOKED_BACK) -> Iterator[dict[str, Any]]:
    """Trainer states of the newest adapters, the newest first; those that cannot be read are left out.

    One listing, and two small files of each.
    """
    under = f"{store.namespace}/{ADAPTERS.folder}/"
    manifests = [found for found in store.objects.listing(under) if found.key.endswith(f"/{MANIFEST}")]
    manifests.sort(key=lambda found: found.modified, reverse=True)
    for found in manifests[:newest]:
        name = found.key.removeprefix(under).removesuffix(f"/{MANIFEST}")
        with suppress(UserError, OSError, ValueError):
            if manifest := store.manifest(ADAPTERS.folder, name):
                yield json.loads(store.read(ADAPTERS.folder, name, manifest, TRAINER_STATE))


def read_plan(store: ArtifactStore, ref: ArtifactRef) -> dict[str, Any]:
    """The plan of a training, as `preflight.plan.Plan.to_dict` made it."""
    return json.loads((store.fetch(ref) / PLAN).read_text(encoding="utf-8"))


def predicted(plan: dict[str, Any]) -> dict[str, float]:
    """Those of a plan's numbers that are measured later, by the names that `reporting.numbers` gives them."""
    hours, work, devices = plan["hours"], plan["work"] or {}, plan["device"]["processes"]
    found = {
        **work,
        "peak_memory_mib": plan["peak_memory_mib"],
        "training_seconds": hours and round(3600 * hours, 1),
        "device_hours": hours and round(hours * devices, 4),
        "cost": plan["cost"] and round(plan["cost"], 2),
    }
    return {name: value for name, value in found.items() if value is not None}


def side_by_side(plan: dict[str, Any], found: dict[str, float]) -> list[dict[str, str]]:
    """Predicted and measured, as rows of a table."""
    expected = predicted(plan)
    return [
        {
            "": name.replace("_", " "),
            "predicted": f"{expected[name]:,}",
            "measured": f"{value:,}",
            "difference": f"{expected[name] / value - 1:+.1%}" if value else "",
        }
        for name, value in found.items()
        if name in expected
    ]
