"""Looking after a store: what is in it, what refers to what, and what may go."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from finetune_assets.config.schema import StoreConfig
from finetune_assets.store.artifacts import ATTEMPT, CLAIM, JOBS, MANIFEST, SHARED, ArtifactStore
from finetune_assets.store.manifest import Manifest, ManifestError, parse
from finetune_assets.store.objects import Objects, Stored

FINGERPRINT = re.compile(r"\b[0-9a-f]{64}\b")
READERS = 16


@dataclass(frozen=True)
class Retention:
    """What garbage collection keeps of a kind, besides what is young and what something kept refers to.

    Attributes:
        newest: The setting of `configs/store.yaml` that says how many of the newest stay; empty for none.
        of_each_experiment: Count the newest by experiment.
        with_kept: The kind whose kept artifacts also keep those of this kind that refer to them.
        collected: False for a kind that is never collected.
    """

    newest: str = ""
    of_each_experiment: bool = False
    with_kept: str = ""
    collected: bool = True


@dataclass(frozen=True)
class Artifact:
    """One artifact as its manifest has it.

    Attributes:
        namespace: Whose it is; empty for a base model, which is everybody's.
        kind: Such as `adapters`.
        name: Path below the kind.
        manifest: Its manifest.
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

    @property
    def refers_to(self) -> set[str]:
        """Fingerprints of what it was made from."""
        return set(FINGERPRINT.findall(json.dumps(self.manifest.made_from))) - {self.manifest.fingerprint}


@dataclass(frozen=True)
class Inventory:
    """Everything in a store.

    Attributes:
        artifacts: Those of all namespaces, newest first.
        attempts: Objects of every attempt at an artifact, by the artifact's prefix and the attempt's name.
        unreadable: What is wrong with a manifest that cannot be read, by the artifact's prefix.
        records: Small files that name artifacts: pins and champions, by key.
    """

    artifacts: list[Artifact]
    attempts: dict[tuple[str, str], list[Stored]]
    unreadable: dict[str, str]
    records: dict[str, bytes]


def inventory(objects: Objects) -> Inventory:
    """List a store once, and read every manifest."""
    manifests: list[str] = []
    records: list[str] = []
    attempts: dict[tuple[str, str], list[Stored]] = defaultdict(list)
    for stored in objects.listing():
        parts = stored.key.split("/")
        at = next((i for i, part in enumerate(parts) if ATTEMPT.fullmatch(part)), None)
        if at is not None:
            attempts["/".join(parts[:at]), parts[at]].append(stored)
        elif parts[-1] == CLAIM:
            attempts["/".join(parts[:-1]), CLAIM].append(stored)
        elif parts[-1] == MANIFEST:
            manifests.append(stored.key)
        elif len(parts) > 3 and parts[1] == JOBS:
            attempts["/".join(parts[:2]), parts[2]].append(stored)
        elif len(parts) > 2 and parts[1] in ("pins", "champions"):
            records.append(stored.key)
    artifacts, unreadable = [], {}
    with ThreadPoolExecutor(READERS) as pool:
        read = {key: raw for key, raw in zip(records, pool.map(partial(_get, objects), records), strict=True) if raw}
        for key, raw in zip(manifests, pool.map(partial(_get, objects), manifests), strict=True):
            prefix = key.removesuffix(f"/{MANIFEST}")
            try:
                if raw is not None:
                    artifacts.append(_artifact(prefix, parse(raw, f"{objects.url}/{key}")))
            except ManifestError as e:
                unreadable[prefix] = str(e)
    artifacts.sort(key=lambda artifact: artifact.manifest.created, reverse=True)
    return Inventory(artifacts, dict(attempts), unreadable, read)


def _get(objects: Objects, key: str) -> bytes | None:
    try:
        return objects.get(key)
    except FileNotFoundError:  # it went since it was listed
        return None


def _artifact(prefix: str, manifest: Manifest) -> Artifact:
    first, _, rest = prefix.partition("/")
    if first == SHARED:
        return Artifact("", SHARED, rest, manifest)
    kind, _, name = rest.partition("/")
    return Artifact(first, kind, name, manifest)


@dataclass(frozen=True)
class Removal:
    """Something that may go.

    Attributes:
        prefix: The artifact's.
        attempt: Whose files go.
        whole: Whether the artifact goes, and not just files that no manifest names.
        why: For people.
        keys: The files.
        size: Bytes.
    """

    prefix: str
    attempt: str
    whole: bool
    why: str
    keys: list[str] = field(repr=False)
    size: int


def plan(
    found: Inventory,
    namespace: str,
    config: StoreConfig,
    retention: Mapping[str, Retention],
    now: datetime | None = None,
) -> list[Removal]:
    """What may go from a namespace and from the base models that all share.

    An artifact of a kind in `retention` goes if it is older than the limit, and neither among the newest that are kept
    nor what one that stays was made from. Files go if they are older than the limit and no manifest names them: those
    of a writer that died, lost a race, or was replaced.
    """
    limit = (now or datetime.now(UTC)) - timedelta(days=config.keep_days)
    staying = _staying(found, namespace, config, retention, limit)
    going = [artifact for artifact in found.artifacts if artifact.prefix not in staying]
    named = {(artifact.prefix, artifact.manifest.folder) for artifact in found.artifacts}
    why = "nothing that is kept refers to it"
    removals = [_removal(found, artifact.prefix, artifact.manifest.folder, why) for artifact in going]
    for (prefix, attempt), files in found.attempts.items():
        ours = prefix.startswith((f"{namespace}/", f"{SHARED}/"))
        young = max(file.modified for file in files) >= limit
        if ours and not young and (prefix, attempt) not in named and prefix not in found.unreadable:
            removals.append(_removal(found, prefix, attempt, "no manifest names these files", whole=False))
    return sorted(removals, key=lambda removal: removal.prefix)


def _removal(found: Inventory, prefix: str, attempt: str, why: str, whole: bool = True) -> Removal:
    files = found.attempts.get((prefix, attempt), [])
    return Removal(prefix, attempt, whole, why, [file.key for file in files], sum(file.size for file in files))


def _staying(
    found: Inventory, namespace: str, config: StoreConfig, retention: Mapping[str, Retention], limit: datetime
) -> set[str]:
    """Prefixes of the artifacts that stay: the roots, and all that they were made from."""
    by_fingerprint = defaultdict(list)
    for artifact in found.artifacts:
        by_fingerprint[artifact.manifest.fingerprint].append(artifact)
    staying: dict[str, Artifact] = {}

    def keep(artifacts: Iterable[Artifact]) -> None:
        waiting = [artifact for artifact in artifacts if artifact.prefix not in staying]
        while waiting:
            artifact = waiting.pop()
            staying[artifact.prefix] = artifact
            referred = (other for name in artifact.refers_to for other in by_fingerprint[name])
            waiting += [other for other in referred if other.prefix not in staying]

    never_collected = Retention(collected=False)
    keep(artifact for artifact in found.artifacts if artifact.namespace not in ("", namespace))
    keep(artifact for artifact in found.artifacts if artifact.created >= limit)
    keep(one for one in found.artifacts if not retention.get(one.kind, never_collected).collected)
    ours = [artifact for artifact in found.artifacts if artifact.namespace == namespace]
    newest: dict[tuple[str, str], list[Artifact]] = defaultdict(list)
    for artifact in ours:
        rule = retention.get(artifact.kind, never_collected)
        if rule.newest:
            newest[artifact.kind, artifact.experiment if rule.of_each_experiment else ""].append(artifact)
    for (kind, _), artifacts in newest.items():
        keep(artifacts[: getattr(config, retention[kind].newest)])
    for key, record in found.records.items():
        keep(_named_by(key, record, by_fingerprint, found.artifacts))
    for kind, rule in retention.items():
        if rule.with_kept:
            kept = {one.manifest.fingerprint for one in staying.values() if one.kind == rule.with_kept}
            keep(artifact for artifact in ours if artifact.kind == kind and artifact.refers_to & kept)
    return set(staying)


def _named_by(
    key: str, record: bytes, by_fingerprint: dict[str, list[Artifact]], artifacts: list[Artifact]
) -> Iterator[Artifact]:
    """What a record stands for: a champion's fingerprints, or the commit that a branch is pinned to."""
    text = record.decode("utf-8", errors="replace")
    for fingerprint in FINGERPRINT.findall(text):
        yield from by_fingerprint[fingerprint]
    commits = set(re.findall(r"\b[0-9a-f]{40}\b", text))
    yield from (artifact for artifact in artifacts if artifact.kind == SHARED and _commit(artifact) in commits)


def _commit(artifact: Artifact) -> str:
    return artifact.name.rpartition("/")[2]


def remove(store: ArtifactStore, removal: Removal) -> bool:
    """Carry out a removal if nothing has changed since it was planned; whether it was."""
    key = f"{removal.prefix}/{MANIFEST}"
    try:
        named = parse(store.objects.get(key), key).folder
    except FileNotFoundError:
        named = ""
    except ManifestError:
        return False
    if removal.whole != (named == removal.attempt):
        return False
    if removal.whole:
        store.objects.delete([key])  # first: from here on it does not exist
    store.objects.delete(removal.keys)
    return True


def made_from(found: Inventory, artifact: Artifact) -> list[Artifact]:
    """What an artifact was made from, as far as it is still there."""
    return _related(found, artifact, lambda other: other.manifest.fingerprint in artifact.refers_to)


def used_by(found: Inventory, artifact: Artifact) -> list[Artifact]:
    """What was made from an artifact."""
    return _related(found, artifact, lambda other: artifact.manifest.fingerprint in other.refers_to)


def _related(found: Inventory, artifact: Artifact, related: Callable[[Artifact], Any]) -> list[Artifact]:
    same = (other for other in found.artifacts if other.namespace in ("", artifact.namespace) or not artifact.namespace)
    return [other for other in same if related(other)]
