"""Statistics by which two versions of the raw data are compared, and the last good version's."""

from dataclasses import asdict, dataclass
from typing import Any

import dagster as dg

from finetune_assets.resources.raw_versions import DATA_VERSION_TAG, GOOD_TAG, is_of_source

PROFILE = "profile"
"""Metadata key of the profile with which later versions are compared."""
LOOKED_BACK = 50
"""Number of recent materializations searched for the last good version."""
CATEGORIES = 100


@dataclass(frozen=True)
class Profile:
    """Statistics by which two versions of the raw data are compared."""

    rows: int
    categories: dict[str, int]
    lengths: dict[str, int]

    @staticmethod
    def of(statistics: dict[str, Any]) -> "Profile":
        most = dict(list(statistics["categories"].items())[:CATEGORIES])
        return Profile(statistics["rows"], most, statistics["quality"]["lengths"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def last_good(instance: dg.DagsterInstance, version: str, source: str) -> Profile | None:
    """Profile of the newest other version that passed its blocking checks; None if the instance has no such version.

    Only versions of the same source are compared. Revisions of one Hub dataset count as the same source.
    """
    page = instance.fetch_materializations(dg.AssetKey("dolly_raw"), limit=LOOKED_BACK)
    for record in page.records:
        materialization = record.asset_materialization
        tags = (materialization.tags if materialization else None) or {}
        if not materialization or PROFILE not in materialization.metadata:
            continue
        if not is_of_source(materialization, source):
            continue
        if GOOD_TAG in tags and tags.get(DATA_VERSION_TAG) != version:
            return Profile(**materialization.metadata[PROFILE].value)  # type: ignore[arg-type]
    return None
