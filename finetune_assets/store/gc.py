"""Inventory and garbage collection of a store: its artifacts, their references, and what may be removed."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

from finetune_assets.config.schema import StoreConfig
from finetune_assets.store.artifacts import ATTEMPT, CLAIM, JOBS, MANIFEST, SHARED, ArtifactStore
from finetune_assets.store.errors import UnreadableObject
from finetune_assets.store.json_object import MOST_BYTES
from finetune_assets.store.manifest import Manifest, ManifestError, check_belongs, parse
from finetune_assets.store.objects import ObjectInfo, ObjectStorage

FINGERPRINT = re.compile(r"\b[0-9a-f]{64}\b")
READERS = 16


@dataclass(frozen=True)
class Retention:
    """Retention rule of an artifact kind, in addition to the age limit and references from kept artifacts.

    Attributes:
        newest: Setting in `configs/store.yaml` with the number of newest artifacts to keep; empty to keep none.
        of_each_experiment: Apply `newest` to each experiment separately.
        with_kept: Kind of artifacts that, when kept, also keep the artifacts of this kind that refer to them.
        collected: False for a kind that is never collected.
    """

    newest: str = ""
    of_each_experiment: bool = False
    with_kept: str = ""
    collected: bool = True


@dataclass(frozen=True)
class Artifact:
    """An artifact in the store, described by its manifest.

    Attributes:
        namespace: Namespace of the artifact; empty for a base model, which all namespaces share.
        kind: Artifact kind, such as `adapters`.
        name: Path below the kind.
        manifest: Manifest of the artifact.
    """

    namespace: str
    kind: str
    name: str
    manifest: Manifest

    @property
    def prefix(self) -> str:
        return "/".join(part for part in (self.namespace, self.kind, self.name) if part)

    @property
    def created(self) -> datetime:
        return datetime.fromisoformat(self.manifest.created)

    @property
    def experiment(self) -> str:
        return str(self.manifest.made_from.get("experiment") or "")

    @cached_property
    def refers_to(self) -> set[str]:
        """Fingerprints of the inputs of this artifact."""
        return set(FINGERPRINT.findall(json.dumps(self.manifest.made_from))) - {self.manifest.fingerprint}


@dataclass(frozen=True)
class Inventory:
    """Contents of a store.

    Attributes:
        artifacts: Artifacts of all namespaces, newest first.
        attempts: Objects of every attempt at an artifact, by the artifact's prefix and the attempt's name.
        unreadable: Errors of unreadable manifests, by the artifact's prefix.
        records: Small files that refer to artifacts (pins and champions), by key.
        skipped: Errors of everything else that cannot be read, such as links in a folder, by key.
    """

    artifacts: list[Artifact]
    attempts: dict[tuple[str, str], list[ObjectInfo]]
    unreadable: dict[str, str]
    records: dict[str, bytes]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """Errors of everything that cannot be read, one line each."""
        return [*self.unreadable.values(), *self.skipped.values()]

    @property
    def incomplete(self) -> set[str]:
        """Namespaces that may refer to more artifacts than could be read. Base models refer to none."""
        hidden = (key for key in self.skipped if not any(ATTEMPT.fullmatch(part) for part in key.split("/")))
        return {key.partition("/")[0] for key in (*self.unreadable, *hidden)} - {SHARED}


def inventory(objects: ObjectStorage) -> Inventory:
    """List all objects of a store once, and read every manifest. What cannot be read is reported, and skipped."""
    manifests: list[ObjectInfo] = []
    records: list[ObjectInfo] = []
    attempts: dict[tuple[str, str], list[ObjectInfo]] = defaultdict(list)
    skipped: dict[str, str] = {}
    for stored in objects.listing(skipped=skipped):
        parts = stored.key.split("/")
        at = next((i for i, part in enumerate(parts) if ATTEMPT.fullmatch(part)), None)
        if at is not None:
            attempts["/".join(parts[:at]), parts[at]].append(stored)
        elif parts[-1] == CLAIM:
            attempts["/".join(parts[:-1]), CLAIM].append(stored)
        elif parts[-1] == MANIFEST:
            manifests.append(stored)
        elif len(parts) > 3 and parts[1] == JOBS:
            attempts["/".join(parts[:2]), parts[2]].append(stored)
        elif len(parts) > 2 and parts[1] in ("pins", "champions"):
            records.append(stored)
    artifacts, unreadable = [], {}

    def read(stored: ObjectInfo) -> tuple[str, bytes | str | None]:
        return stored.key, _get(objects, stored)

    with ThreadPoolExecutor(READERS) as pool:
        record_contents = dict(pool.map(read, records))
        for key, content in pool.map(read, manifests):
            prefix, where = key.removesuffix(f"/{MANIFEST}"), f"{objects.url}/{key}"
            try:
                if isinstance(content, bytes):
                    artifacts.append(_artifact(prefix, parse(content, where), where))
                elif content:
                    unreadable[prefix] = content
            except ManifestError as e:
                unreadable[prefix] = str(e)
    artifacts.sort(key=lambda artifact: artifact.manifest.created, reverse=True)
    skipped |= {key: content for key, content in record_contents.items() if isinstance(content, str)}
    read_records = {key: content for key, content in record_contents.items() if isinstance(content, bytes)}
    return Inventory(artifacts, dict(attempts), unreadable, read_records, skipped)


def _get(objects: ObjectStorage, stored: ObjectInfo) -> bytes | str | None:
    """Return an object's content, the error if it cannot be read, or None if it was deleted since the listing."""
    try:
        if stored.size > MOST_BYTES:
            raise UnreadableObject(
                f"{objects.url}/{stored.key}: {stored.size:,} bytes, at most {MOST_BYTES:,} are read; delete it"
            )
        return objects.get(stored.key, MOST_BYTES)
    except FileNotFoundError:
        return None
    except UnreadableObject as e:
        return str(e)


def _artifact(prefix: str, manifest: Manifest, where: str) -> Artifact:
    first, _, rest = prefix.partition("/")
    if first == SHARED:
        check_belongs(manifest, SHARED, "", where)
        return Artifact("", SHARED, rest, manifest)
    kind, _, name = rest.partition("/")
    check_belongs(manifest, kind, name, where)
    return Artifact(first, kind, name, manifest)


@dataclass(frozen=True)
class Removal:
    """An artifact or a set of files to remove.

    Attributes:
        prefix: Key prefix of the artifact.
        attempt: Attempt that the files belong to.
        whole: True to remove the artifact; False to remove only files that are not in its manifest.
        why: Human-readable reason.
        keys: Keys of the files.
        size: Total size of the files in bytes.
    """

    prefix: str
    attempt: str
    whole: bool
    why: str
    keys: list[str] = field(repr=False)
    size: int


def plan(
    contents: Inventory,
    namespace: str,
    config: StoreConfig,
    retention: Mapping[str, Retention],
    now: datetime | None = None,
) -> list[Removal]:
    """Plan the removals from a namespace and from the shared base models.

    An artifact of a kind in `retention` is removed if it is older than the limit, is not among the newest to keep, and
    is not an input of a kept artifact. Where a manifest or record cannot be read, nothing that it may refer to is
    removed: no artifact of its namespace, and no base model. Files are removed if they are older than the limit and not
    in a manifest: files of a writer that died, lost a race, or was replaced.

    Args:
        contents: Contents of the store.
        namespace: Namespace to collect.
        config: Settings of `configs/store.yaml`.
        retention: Retention rules by kind.
        now: Current time; by default the system clock.

    Returns:
        The removals, sorted by prefix.
    """
    limit = (now or datetime.now(UTC)) - timedelta(days=config.keep_days)
    kept = _kept(contents, namespace, config, retention, limit)
    expired = [artifact for artifact in contents.artifacts if artifact.prefix not in kept]
    current = {(artifact.prefix, artifact.manifest.folder) for artifact in contents.artifacts}
    why = "not referenced by a kept artifact"
    removals = [_removal(contents, artifact.prefix, artifact.manifest.folder, why) for artifact in expired]
    for (prefix, attempt), files in contents.attempts.items():
        ours = prefix.startswith((f"{namespace}/", f"{SHARED}/"))
        young = max(file.modified for file in files) >= limit
        if ours and not young and (prefix, attempt) not in current and prefix not in contents.unreadable:
            removals.append(_removal(contents, prefix, attempt, "files not listed in a manifest", whole=False))
    return sorted(removals, key=lambda removal: removal.prefix)


def _removal(contents: Inventory, prefix: str, attempt: str, why: str, whole: bool = True) -> Removal:
    files = contents.attempts.get((prefix, attempt), [])
    return Removal(prefix, attempt, whole, why, [file.key for file in files], sum(file.size for file in files))


def _kept(
    contents: Inventory, namespace: str, config: StoreConfig, retention: Mapping[str, Retention], limit: datetime
) -> set[str]:
    """Return the prefixes of the artifacts to keep: the roots, and all their direct and indirect inputs."""
    by_fingerprint = defaultdict(list)
    for artifact in contents.artifacts:
        by_fingerprint[artifact.manifest.fingerprint].append(artifact)
    kept: dict[str, Artifact] = {}

    def keep(artifacts: Iterable[Artifact]) -> None:
        waiting = [artifact for artifact in artifacts if artifact.prefix not in kept]
        while waiting:
            artifact = waiting.pop()
            kept[artifact.prefix] = artifact
            referred = (other for name in artifact.refers_to for other in by_fingerprint[name])
            waiting += [other for other in referred if other.prefix not in kept]

    never_collected = Retention(collected=False)
    incomplete = contents.incomplete
    keep(artifact for artifact in contents.artifacts if artifact.namespace not in ("", namespace))
    keep(artifact for artifact in contents.artifacts if artifact.namespace in incomplete)
    keep(artifact for artifact in contents.artifacts if incomplete and artifact.kind == SHARED)
    keep(artifact for artifact in contents.artifacts if artifact.created >= limit)
    keep(artifact for artifact in contents.artifacts if not retention.get(artifact.kind, never_collected).collected)
    ours = [artifact for artifact in contents.artifacts if artifact.namespace == namespace]
    newest: dict[tuple[str, str], list[Artifact]] = defaultdict(list)
    for artifact in ours:
        rule = retention.get(artifact.kind, never_collected)
        if rule.newest:
            newest[artifact.kind, artifact.experiment if rule.of_each_experiment else ""].append(artifact)
    for (kind, _), artifacts in newest.items():
        keep(artifacts[: getattr(config, retention[kind].newest)])
    for key, record in contents.records.items():
        keep(_named_by(key, record, by_fingerprint, contents.artifacts))
    for kind, rule in retention.items():
        if rule.with_kept:
            users = {other.manifest.fingerprint for other in kept.values() if other.kind == rule.with_kept}
            keep(artifact for artifact in ours if artifact.kind == kind and artifact.refers_to & users)
    return set(kept)


def _named_by(
    key: str, record: bytes, by_fingerprint: dict[str, list[Artifact]], artifacts: list[Artifact]
) -> Iterator[Artifact]:
    """Yield the artifacts that a record refers to, by a champion's fingerprints or the commit pinned for a branch."""
    text = record.decode("utf-8", errors="replace")
    for fingerprint in FINGERPRINT.findall(text):
        yield from by_fingerprint[fingerprint]
    commits = set(re.findall(r"\b[0-9a-f]{40}\b", text))
    yield from (artifact for artifact in artifacts if artifact.kind == SHARED and _commit(artifact) in commits)


def _commit(artifact: Artifact) -> str:
    return artifact.name.rpartition("/")[2]


def remove(store: ArtifactStore, removal: Removal) -> bool:
    """Execute a planned removal unless the artifact has changed since; return whether it was executed."""
    key = f"{removal.prefix}/{MANIFEST}"
    try:
        named = parse(store.objects.get(key, MOST_BYTES), key).folder
    except FileNotFoundError:
        named = ""
    except (ManifestError, UnreadableObject):
        return False
    if removal.whole != (named == removal.attempt):
        return False
    if removal.whole:
        store.objects.delete([key])  # first: without its manifest the artifact no longer exists
    store.objects.delete(removal.keys)
    return True


def made_from(contents: Inventory, artifact: Artifact) -> list[Artifact]:
    """Return the inputs of an artifact that are still in the store."""
    return _related(contents, artifact, lambda other: other.manifest.fingerprint in artifact.refers_to)


def used_by(contents: Inventory, artifact: Artifact) -> list[Artifact]:
    """Return the artifacts that have this artifact as an input."""
    return _related(contents, artifact, lambda other: artifact.manifest.fingerprint in other.refers_to)


def _related(contents: Inventory, artifact: Artifact, related: Callable[[Artifact], Any]) -> list[Artifact]:
    same = (
        other for other in contents.artifacts if other.namespace in ("", artifact.namespace) or not artifact.namespace
    )
    return [other for other in same if related(other)]
