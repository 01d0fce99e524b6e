"""The history of a source of raw data: which of its versions passed their blocking checks, and since when.

A small file in the store records each time that a version became the newest good one. Experiments with `data.replay`
train on rows of earlier versions, and of several sources, one that is not available or whose newest version is bad is
replaced by its newest good one.
"""

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

from finetune_assets.artifacts.kinds import RAW
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import UnreadableObject
from finetune_assets.store.json_object import MOST_BYTES, InvalidJson, check_types, parse_object

logger = logging.getLogger(__name__)
FOLDER = "streams"


def record_good(store: ArtifactStore, source: str, version: str) -> None:
    """Record that a version of a source passed its blocking checks, unless it was the newest such version already."""
    if any(record["version"] == version for record in _records(store, source)[-1:]):
        return
    at = datetime.now(UTC).isoformat()
    content = {"source": source, "version": version, "at": at}
    store.objects.create(f"{_prefix(store, source)}{at}-{version}.json", json.dumps(content).encode())


def earlier_versions(store: ArtifactStore, source: str, version: str) -> list[ArtifactRef]:
    """Good versions of a source before a version, oldest first, as far as the store still has them."""
    names = list(dict.fromkeys(record["version"] for record in _records(store, source)))
    before = names[: names.index(version)] if version in names else names
    return [ref for ref in (store.find(RAW.folder, name) for name in before) if ref]


def newest_version(store: ArtifactStore, source: str) -> ArtifactRef | None:
    """The version of a source that became good last, of those that the store still has."""
    refs = (store.find(RAW.folder, record["version"]) for record in reversed(_records(store, source)))
    return next(filter(None, refs), None)


def is_good(store: ArtifactStore, source: str, version: str) -> bool:
    """Whether a version of a source has ever passed its blocking checks."""
    return any(record["version"] == version for record in _records(store, source))


def _records(store: ArtifactStore, source: str) -> list[dict[str, Any]]:
    """All records, oldest first. Unreadable ones are reported, and skipped."""
    keys = sorted(stored.key for stored in store.objects.listing(_prefix(store, source)))
    records = (_record(store, key) for key in keys if key.endswith(".json"))
    return [record for record in records if record]


def _record(store: ArtifactStore, key: str) -> dict[str, Any] | None:
    try:
        record = parse_object(store.objects.get(key, MOST_BYTES))
        check_types(record, {"version": str})
        if not re.fullmatch("[0-9a-f]{64}", record["version"]):
            raise InvalidJson(f"version '{record['version'][:60]}' is not a fingerprint")
    except (InvalidJson, UnreadableObject) as e:
        logger.warning("%s/%s: unreadable record ignored (%s); delete it", store.url, key, e)
        return None
    return record


def _prefix(store: ArtifactStore, source: str) -> str:
    return f"{store.namespace}/{FOLDER}/{fingerprint(source=source)[:16]}/"
