"""Publish folders as artifacts, find them by name, and fetch them verified into a node-local cache.

Files go first, the manifest last and create-only: an artifact is either whole or not there.
"""

import hashlib
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore

from finetune_assets.errors import UserError
from finetune_assets.store.manifest import FileEntry, Manifest, parse

MANIFEST = "manifest.json"
SHARED_KINDS = ("base-models",)
CHUNK = 4 << 20
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class StoreError(UserError):
    """The store cannot be used as asked."""


class ArtifactMissing(StoreError):
    """Nothing of that name has been published."""


class CorruptArtifact(StoreError):
    """A file of the store is not what its manifest says."""


@dataclass(frozen=True)
class ArtifactRef:
    """A small, typed reference to a published artifact; this is what assets hand to one another.

    Attributes:
        kind: Such as `tokenized`.
        name: Path below the kind; the fingerprint, but for base models (`<repo>/<revision>`).
        fingerprint: Identity of the content.
        uri: Where the files lie.
        files: How many.
        size: Bytes of all files together.
    """

    kind: str
    name: str
    fingerprint: str
    uri: str
    files: int
    size: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_store(url: str) -> ObjectStore:
    """The object store behind a URL.

    Raises:
        StoreError: if the URL is of no known form.
    """
    scheme, separator, path = url.partition("://")
    if scheme != "file" or not separator or not path.startswith("/"):
        raise StoreError(f"FINETUNE_STORE: '{url}' is not a store; use file:///an/absolute/folder")
    try:
        return LocalStore(path, mkdir=True)
    except (OSError, BaseError) as e:
        raise StoreError(f"FINETUNE_STORE: '{url}' cannot be used as a folder: {str(e).splitlines()[0]}") from e


class ArtifactStore:
    """Artifacts behind one URL.

    Args:
        url: `file:///folder`.
        namespace: Keeps one developer's or branch's artifacts from another's. Base models are shared by all.
        cache: Node-local folder for fetched artifacts.
    """

    def __init__(self, url: str, namespace: str, cache: Path) -> None:
        if not re.fullmatch(NAME, namespace):
            raise StoreError(f"FINETUNE_NAMESPACE: '{namespace}' must be letters, digits, '.', '_' and '-'")
        self.url = url.rstrip("/")
        self.namespace = namespace
        self.cache = cache
        self.objects = open_store(self.url)

    def find(self, kind: str, name: str) -> ArtifactRef | None:
        """The artifact of that name, or None."""
        manifest = self.manifest(kind, name)
        return self._ref(kind, name, manifest) if manifest else None

    def resolve(self, kind: str, name: str, made_by: str) -> ArtifactRef:
        """The artifact of that name.

        Raises:
            ArtifactMissing: telling to materialize `made_by` first.
        """
        ref = self.find(kind, name)
        if ref is None:
            raise ArtifactMissing(
                f"materialize {made_by} first, with the same settings and overrides: what they and the data of now "
                f"demand is not in the store ({self.url}/{self._prefix(kind, name)})"
            )
        return ref

    def manifest(self, kind: str, name: str) -> Manifest | None:
        """The manifest of that name, checked, or None."""
        key = f"{self._prefix(kind, name)}/{MANIFEST}"
        try:
            raw = bytes(obstore.get(self.objects, key).bytes())
        except FileNotFoundError:
            return None
        return parse(raw, f"{self.url}/{key}")

    def publish(
        self, folder: Path, kind: str, name: str, fingerprint: str, made_from: Mapping[str, Any], replace: bool = False
    ) -> ArtifactRef:
        """Store every file of `folder`, then its manifest.

        If another writer was first, its artifact is returned and this one's files are removed, unless `replace`.
        """
        attempt = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
        prefix = self._prefix(kind, name)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            raise StoreError(f"{folder}: nothing to publish, the folder is empty")
        entries = []
        for path in files:
            relative = path.relative_to(folder).as_posix()
            obstore.put(self.objects, f"{prefix}/{attempt}/{relative}", path)
            entries.append(FileEntry(relative, path.stat().st_size, sha256(path)))
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest(kind, fingerprint, attempt, tuple(entries), dict(made_from), created)
        mode = "overwrite" if replace else "create"
        try:
            obstore.put(self.objects, f"{prefix}/{MANIFEST}", manifest.to_json(), mode=mode)
        except AlreadyExistsError:
            obstore.delete(self.objects, [f"{prefix}/{attempt}/{entry.path}" for entry in entries])
            return self.resolve(kind, name, kind)
        return self._ref(kind, name, manifest)

    def fetch(self, ref: ArtifactRef, only: Callable[[str], bool] = lambda path: True) -> Path:
        """A local folder with the artifact's files, verified while they were copied.

        Args:
            ref: The artifact.
            only: Takes a file's path and says whether it is wanted. Files already here are not fetched again.

        Raises:
            ArtifactMissing: if it is not in the store (any more).
            CorruptArtifact: if a file's size or sha256 is not what the manifest says.
        """
        manifest = self.manifest(ref.kind, ref.name)
        if manifest is None or manifest.fingerprint != ref.fingerprint:
            raise ArtifactMissing(f"{ref.uri}: no longer in the store; materialize it again")
        prefix = f"{self._prefix(ref.kind, ref.name)}/{manifest.folder}"
        target = self.cache / prefix
        for entry in manifest.files:
            local = target / entry.path
            here = local.is_file() and local.stat().st_size == entry.size
            if only(entry.path) and not here:
                self._fetch_file(f"{prefix}/{entry.path}", entry, local)
        return target

    def _fetch_file(self, key: str, entry: FileEntry, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        digest = hashlib.sha256()
        try:
            with open(partial, "wb") as out:
                for chunk in obstore.get(self.objects, key).stream(min_chunk_size=CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
            if partial.stat().st_size != entry.size or digest.hexdigest() != entry.sha256:
                raise CorruptArtifact(
                    f"{self.url}/{key}: size or sha256 differs from its manifest; materialize its asset again with "
                    "force to replace it"
                )
            partial.replace(target)
        except FileNotFoundError as e:
            raise CorruptArtifact(f"{self.url}/{key}: named by the manifest, missing in the store") from e
        finally:
            partial.unlink(missing_ok=True)

    def _prefix(self, kind: str, name: str) -> str:
        return f"{kind}/{name}" if kind in SHARED_KINDS else f"{self.namespace}/{kind}/{name}"

    def _ref(self, kind: str, name: str, manifest: Manifest) -> ArtifactRef:
        uri = f"{self.url}/{self._prefix(kind, name)}/{manifest.folder}"
        return ArtifactRef(kind, name, manifest.fingerprint, uri, len(manifest.files), manifest.size)


def sha256(path: Path) -> str:
    """Of a file's content, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
