"""Statistics by which two versions of the raw data are compared, and the last good version's."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import dagster as dg

from finetune_assets.resources.raw_versions import DATA_VERSION_TAG, GOOD_TAG, is_of_source

PROFILE = "profile"
"""Metadata key of the profile with which later versions are compared."""
VERSIONS = "versions"
"""Metadata key of several sources: fingerprint of each source's version, by name."""
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


def last_good(instance: dg.DagsterInstance, version: str, sources: str, name: str) -> Profile | None:
    """Profile of the newest other version of a source in a version of the raw data that passed its blocking checks.

    Args:
        instance: Dagster instance.
        version: Fingerprint of the source's version to compare.
        sources: Text that names all sources; only versions of the same sources are compared.
        name: Name of the source.

    Returns:
        The profile; None if the instance has no such version.
    """
    for materialization in _good(instance, sources):
        if _parts(materialization, name) != version:
            profiles: Any = materialization.metadata[PROFILE].value
            profile = profiles.get(name) if VERSIONS in materialization.metadata else profiles
            if profile:
                return Profile(**profile)
    return None


def _good(instance: dg.DagsterInstance, sources: str) -> Iterator[dg.AssetMaterialization]:
    """The newest materializations of `dolly_raw` that passed their blocking checks, newest first."""
    page = instance.fetch_materializations(dg.AssetKey("dolly_raw"), limit=LOOKED_BACK)
    for record in page.records:
        materialization = record.asset_materialization
        tags = (materialization.tags if materialization else None) or {}
        if not materialization or PROFILE not in materialization.metadata or GOOD_TAG not in tags:
            continue
        if is_of_source(materialization, sources):
            yield materialization


def _parts(materialization: dg.AssetMaterialization, name: str) -> str | None:
    """Fingerprint of a source's version: of a single source, the data version."""
    parts: Any = materialization.metadata[VERSIONS].value if VERSIONS in materialization.metadata else None
    version = parts.get(name) if parts else (materialization.tags or {}).get(DATA_VERSION_TAG)
    return str(version) if version else None
