"""Measurements and plans of earlier trainings in the store."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.artifacts.layout import PLAN, TRAINER_STATE
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import MANIFEST, ArtifactRef, ArtifactStore
from finetune_assets.store.errors import StoreError
from finetune_assets.store.json_object import MOST_FILE_BYTES, InvalidJson, check_types, parse_object, read_json

LOOKED_BACK = 20
NUMBER = (int, float, type(None))
PLAN_TYPES: dict[str, type | tuple[type, ...]] = {
    "fits": bool,
    "summary": str,
    "device": dict,
    "work": (dict, type(None)),
    "evaluations": (dict, type(None)),
    **dict.fromkeys(("hours", "cost", "peak_memory_mib", "usable_mib"), NUMBER),
}
"""Fields of every plan, also of those that earlier versions made."""


def trainer_states(store: ArtifactStore, newest: int = LOOKED_BACK) -> Iterator[dict[str, Any]]:
    """Trainer states of the newest adapters, newest first; unreadable ones are skipped.

    Requires one listing, and two small files per adapter.
    """
    under = f"{store.namespace}/{ADAPTERS.folder}/"
    manifests = [stored for stored in store.objects.listing(under) if stored.key.endswith(f"/{MANIFEST}")]
    manifests.sort(key=lambda stored: stored.modified, reverse=True)
    for stored in manifests[:newest]:
        name = stored.key.removeprefix(under).removesuffix(f"/{MANIFEST}")
        with suppress(UserError, OSError, ValueError):
            if manifest := store.manifest(ADAPTERS.folder, name):
                yield parse_object(store.read(ADAPTERS.folder, name, manifest, TRAINER_STATE), MOST_FILE_BYTES)


def read_plan(store: ArtifactStore, ref: ArtifactRef) -> dict[str, Any]:
    """The plan of a training, as returned by `preflight.plan.Plan.to_dict`.

    Raises:
        StoreError: if the file is not a plan.
    """
    where = f"{ref.kind}/{ref.name}"
    plan = read_json(store.fetch(ref) / PLAN, where)
    plan.setdefault("summary", plan.get("told"))  # older name
    plan.setdefault("evaluations", None)  # absent from plans of earlier versions
    try:
        check_types(plan, PLAN_TYPES)
        check_types(plan["device"], {"processes": int})
    except InvalidJson as e:
        raise StoreError(f"{PLAN} of {where}: {e}; materialize training_plan again with force") from e
    return plan


def predicted(plan: dict[str, Any]) -> dict[str, float]:
    """Planned values that training also measures, by their names in `reporting.numbers`."""
    hours, work, devices = plan["hours"], plan["work"] or {}, plan["device"]["processes"]
    values = {
        **work,
        "peak_memory_mib": plan["peak_memory_mib"],
        "training_seconds": hours and round(3600 * hours, 1),
        "device_hours": hours and round(hours * devices, 4),
        "cost": plan["cost"] and round(plan["cost"], 2),
        "evaluation_time_share": round((plan["evaluations"] or {}).get("time_share", 0.0), 4) or None,
    }
    return {name: value for name, value in values.items() if value is not None}


def side_by_side(plan: dict[str, Any], measured: dict[str, float]) -> list[dict[str, str]]:
    """Predicted and measured values, as rows of a table."""
    expected = predicted(plan)
    return [
        {
            "": name.replace("_", " "),
            "predicted": f"{expected[name]:,}",
            "measured": f"{value:,}",
            "difference": f"{expected[name] / value - 1:+.1%}" if value else "",
        }
        for name, value in measured.items()
        if name in expected
    ]
