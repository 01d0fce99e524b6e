"""The history of a source of raw data: which of its versions passed their blocking checks, and since when.

Each version has one small file in the store, which is written when its checks pass for the first time. Experiments with
`data.replay` train on rows of earlier versions.
"""

import json
from datetime import UTC, datetime
from typing import Any

from finetune_assets.artifacts.kinds import RAW
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore

FOLDER = "streams"


def record_good(store: ArtifactStore, source: str, version: str) -> None:
    """Record that a version of a source passed its blocking checks, unless it is recorded already."""
    content = {"source": source, "version": version, "at": datetime.now(UTC).isoformat()}
    store.objects.create(f"{_prefix(store, source)}{version}.json", json.dumps(content).encode())


def earlier_versions(store: ArtifactStore, source: str, version: str) -> list[ArtifactRef]:
    """Good versions of a source before a version, oldest first, as far as the store still has them."""
    records = sorted(_records(store, source), key=lambda record: (record["at"], record["version"]))
    own = next((record["at"] for record in records if record["version"] == version), None)
    names = [record["version"] for record in records if own is None or record["at"] < own]
    refs = (store.find(RAW.folder, name) for name in names if name != version)
    return [ref for ref in refs if ref]


def newest_version(store: ArtifactStore, source: str) -> ArtifactRef | None:
    """The version of a source that became good last, of those that the store still has."""
    records = sorted(_records(store, source), key=lambda record: record["at"], reverse=True)
    refs = (store.find(RAW.folder, record["version"]) for record in records)
    return next(filter(None, refs), None)


def _records(store: ArtifactStore, source: str) -> list[dict[str, Any]]:
    listed = store.objects.listing(_prefix(store, source))
    return [json.loads(store.objects.get(stored.key)) for stored in listed if stored.key.endswith(".json")]


def _prefix(store: ArtifactStore, source: str) -> str:
    return f"{store.namespace}/{FOLDER}/{fingerprint(source=source)[:16]}/"
