"""Publish folders as artifacts, find them by name, and fetch them verified into a node-local cache.

Files go first, the manifest last and create-only: an artifact is either whole or not there.
"""

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_assets.progress import Progress, in_parallel
from finetune_assets.store.cache import Entry, NodeCache
from finetune_assets.store.errors import ArtifactMissing, CorruptArtifact, StoreError
from finetune_assets.store.hashing import sha256
from finetune_assets.store.manifest import FileEntry, Manifest, ManifestError, parse
from finetune_assets.store.objects import CHUNK, Objects, boto3_client

MANIFEST = "manifest.json"
CHECKPOINTS, JOBS = "checkpoints", "jobs"
SHARED = "base-models"
"""The kind that all namespaces share."""
CLAIM = "claim.json"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
ATTEMPT = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


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

    @property
    def attempt(self) -> str:
        """Which of the writers of this fingerprint it is by."""
        return self.uri.rpartition("/")[2]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ArtifactStore:
    """Artifacts behind one URL.

    Args:
        objects: What the URL stands for.
        namespace: Keeps one developer's or branch's artifacts from another's. Base models are shared by all.
        cache: Node-local folder for fetched artifacts.
    """

    def __init__(self, objects: Objects, namespace: str, cache: NodeCache) -> None:
        if not re.fullmatch(NAME, namespace):
            raise StoreError(f"FINETUNE_NAMESPACE: '{namespace}' must be letters, digits, '.', '_' and '-'")
        if namespace == SHARED:
            raise StoreError(f"FINETUNE_NAMESPACE: '{namespace}' is where everybody's base models lie; take another")
        self.objects, self.namespace, self.cache = objects, namespace, cache

    @property
    def url(self) -> str:
        return self.objects.url

    def find(self, kind: str, name: str) -> ArtifactRef | None:
        """The artifact of that name, or None."""
        manifest = self.manifest(kind, name)
        return self.ref(kind, name, manifest) if manifest else None

    def resolve(self, kind: str, name: str, made_by: str) -> ArtifactRef:
        """The artifact of that name.

        Raises:
            ArtifactMissing: telling to materialize `made_by` first.
        """
        ref = self.find(kind, name)
        if ref is None:
            raise ArtifactMissing(
                f"Artifact not found: {self.url}/{self.prefix(kind, name)}. Materialize {made_by} first, with the same "
                "settings and overrides"
            )
        return ref

    def manifest(self, kind: str, name: str) -> Manifest | None:
        """The manifest of that name, checked, or None."""
        key = f"{self.prefix(kind, name)}/{MANIFEST}"
        try:
            manifest = self._parsed(key)
        except FileNotFoundError:
            return None
        if manifest.kind != kind or (kind != SHARED and manifest.fingerprint != name):
            raise ManifestError(f"{self.url}/{key}: this manifest belongs to another artifact ({manifest.fingerprint})")
        return manifest

    def _parsed(self, key: str) -> Manifest:
        try:
            return parse(self.objects.get(key), f"{self.url}/{key}")
        except ManifestError:  # a byte that flipped on the way is right the second time
            return parse(self.objects.get(key), f"{self.url}/{key}")

    def publish(
        self,
        files: Path | Mapping[str, Path],
        kind: str,
        name: str,
        fingerprint: str,
        made_from: Mapping[str, Any],
        replace: bool = False,
        expected: Mapping[str, str] | None = None,
    ) -> ArtifactRef:
        """Store files, some at once, then their manifest.

        If another writer was first, its artifact is returned and this one's files are removed, unless `replace`.

        Args:
            files: A folder, all of it; or where each file lies here, by its path in the artifact.
            kind: Such as `tokenized`.
            name: Path below the kind.
            fingerprint: Identity of the content.
            made_from: What the manifest says about its origin.
            replace: Publish over an artifact of that name.
            expected: sha256 by path, where it is known what the files must be.

        Raises:
            StoreError: if there is nothing to publish, a file is a link out of the folder or changes meanwhile, or the
                store cannot take it.
        """
        if not replace and (found := self.find(kind, name)):
            return found
        sources = folder_files(files) if isinstance(files, Path) else dict(files)
        if not sources:
            raise StoreError(f"{files}: nothing to publish, the folder is empty")
        prefix = self.prefix(kind, name)
        attempt = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
        keys = [f"{prefix}/{attempt}/{path}" for path in sources]
        try:
            entries = self._upload(f"publishing {kind}/{name}", f"{prefix}/{attempt}", sources, expected or {})
        except BaseException:
            self._forget(keys)
            raise
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest(kind, fingerprint, attempt, entries, created, dict(made_from))
        # If this fails nobody knows whether the manifest is there, so the files stay; garbage collection knows later
        if replace:
            self.objects.put(f"{prefix}/{MANIFEST}", manifest.to_json())
        elif not self.objects.create(f"{prefix}/{MANIFEST}", manifest.to_json()):
            self._forget(keys)
            return self.resolve(kind, name, kind)
        return self.ref(kind, name, manifest)

    def _upload(
        self, what: str, prefix: str, sources: Mapping[str, Path], expected: Mapping[str, str]
    ) -> tuple[FileEntry, ...]:
        sizes = {path: source.stat().st_size for path, source in sources.items()}
        hashes: dict[str, str] = {}
        with Progress(what, sum(sizes.values())) as progress:

            def upload(path: str) -> None:
                reader = _Reader(sources[path], progress)
                self.objects.upload(f"{prefix}/{path}", sizes[path], reader.chunks)
                if reader.size != sizes[path] or reader.sha256 != expected.get(path, reader.sha256):
                    raise StoreError(f"File changed during upload: {sources[path]}. Materialize the asset again")
                hashes[path] = reader.sha256

            in_parallel([lambda path=path: upload(path) for path in _largest_first(sizes)], progress)  # type: ignore[misc]
        return tuple(FileEntry(path, sizes[path], hashes[path]) for path in sorted(sizes))

    def _forget(self, keys: list[str]) -> None:
        """Remove what a publication that came to nothing has stored; where that fails, garbage collection does it."""
        with suppress(StoreError, OSError):
            self.objects.delete(keys)

    def fetch(self, ref: ArtifactRef, only: Callable[[str], bool] = lambda path: True) -> Path:
        """A local folder with the artifact's files, verified while they were copied.

        It stays in the cache while this process lives. What is here already costs no request to the store.

        Args:
            ref: The artifact.
            only: Takes a file's path and says whether it is wanted.

        Raises:
            ArtifactMissing: if it is not in the store (any more).
            CorruptArtifact: if a file's size or sha256 is not what the manifest says, even when fetched again.
            StoreError: if the store does not answer, or the cache has no room.
        """
        prefix = self.prefix(ref.kind, ref.name)
        entry = self.cache.entry(prefix, ref.attempt)
        entry.hold()
        manifest = entry.manifest()
        if manifest and entry.serves(manifest, only):
            return entry.folder
        with self.cache.filling(entry, f"fetches {ref.kind}/{ref.name}"):
            manifest = entry.manifest() or self._manifest_of(ref)
            if manifest.folder == ref.attempt:
                try:
                    self._fill(prefix, entry, manifest, only)
                except OSError as e:
                    raise StoreError(
                        f"{entry.folder}: cannot be written ({e.strerror or e}); see FINETUNE_CACHE and the space left"
                    ) from e
                return entry.folder
        return self.fetch(self.ref(ref.kind, ref.name, manifest), only)  # it was replaced since

    def read(self, kind: str, name: str, manifest: Manifest, path: str) -> bytes:
        """A small file of an artifact, verified. Past the cache, which is not made for a little of many artifacts.

        Raises:
            CorruptArtifact: if there is no such file, or it is not what the manifest says, even when read again.
        """
        key = f"{self.prefix(kind, name)}/{manifest.folder}/{path}"
        wanted = next((file.sha256 for file in manifest.files if file.path == path), None)
        with suppress(FileNotFoundError):
            for _ in range(2 if wanted else 0):
                content = self.objects.get(key)
                if hashlib.sha256(content).hexdigest() == wanted:
                    return content
        raise CorruptArtifact(f"{self.url}/{key}: missing, or not what its manifest says; materialize it with force")

    def _manifest_of(self, ref: ArtifactRef) -> Manifest:
        manifest = self.manifest(ref.kind, ref.name)
        if manifest is None or manifest.fingerprint != ref.fingerprint:
            raise ArtifactMissing(f"{ref.uri}: no longer in the store; materialize it again")
        return manifest

    def _fill(self, prefix: str, entry: Entry, manifest: Manifest, only: Callable[[str], bool]) -> None:
        for path in entry.unexpected(manifest):
            path.unlink()
        absent = entry.missing(manifest, manifest.files)
        missing = [file for file in absent if only(file.path)]
        coming = sum(file.size for file in missing)
        here = manifest.size - sum(file.size for file in absent)
        self.cache.make_room(entry, here + coming, coming)
        entry.manifest_file.write_bytes(manifest.to_json())
        with Progress(f"fetching {prefix}", coming) as progress:

            def fetch(file: FileEntry) -> None:
                partial = entry.partial / hashlib.sha256(file.path.encode()).hexdigest()
                self._fetch_file(f"{prefix}/{manifest.folder}/{file.path}", file, partial, progress)
                entry.accept(partial, file, manifest)

            sizes = {file: file.size for file in missing}
            in_parallel([lambda file=file: fetch(file) for file in _largest_first(sizes)], progress)  # type: ignore[misc]

    def _fetch_file(self, key: str, file: FileEntry, target: Path, progress: Progress) -> None:
        where, again = f"{self.url}/{key}", "materialize its asset again with force to replace it"
        try:
            if not self._read(key, file, progress, target):
                raise CorruptArtifact(f"{where}: size or sha256 differs from its manifest; {again}")
        except FileNotFoundError as e:
            raise CorruptArtifact(f"{where}: named by the manifest, missing in the store; {again}") from e

    def _read(self, key: str, file: FileEntry, progress: Progress, target: Path | str = os.devnull) -> bool:
        """Read a file of the store into `target`; whether it is what the manifest says.

        What is not is read once more: a byte that flipped on the way is right the second time.

        Raises:
            FileNotFoundError: if it is not there.
        """
        return any(self.objects.with_retries(key, lambda: self._copy(key, file, progress, target)) for _ in range(2))

    def _copy(self, key: str, file: FileEntry, progress: Progress, target: Path | str) -> bool:
        digest, size, whole = hashlib.sha256(), 0, False
        try:
            # Buffered: a raw write to a disk that is nearly full may write less, and only returns how much
            with open(target, "wb") as out:
                for chunk in self.objects.stream(key):
                    if size + len(chunk) > file.size:
                        return False
                    size += len(chunk)
                    digest.update(chunk)
                    out.write(chunk)
                    progress.add(len(chunk))
            whole = size == file.size and digest.hexdigest() == file.sha256
            return whole
        finally:
            if not whole:
                progress.take_back(size)

    def verify(self, kind: str, name: str) -> list[str]:
        """Read every file of an artifact from the store; the paths of those that are not what the manifest says.

        Raises:
            ArtifactMissing: if there is no such artifact.
        """
        manifest = self.manifest(kind, name)
        if manifest is None:
            raise ArtifactMissing(f"{kind}/{name}: not in the store")
        bad: list[str] = []
        with Progress(f"verifying {kind}/{name}", manifest.size) as progress:

            def read(file: FileEntry) -> None:
                key = f"{self.prefix(kind, name)}/{manifest.folder}/{file.path}"
                try:
                    whole = self._read(key, file, progress)
                except FileNotFoundError:
                    whole = False
                if not whole:
                    bad.append(file.path)

            in_parallel([lambda file=file: read(file) for file in manifest.files], progress)  # type: ignore[misc]
        return sorted(bad)

    def prefix(self, kind: str, name: str) -> str:
        """Where an artifact's manifest and attempts lie below the URL."""
        return f"{kind}/{name}" if kind == SHARED else f"{self.namespace}/{kind}/{name}"

    def ref(self, kind: str, name: str, manifest: Manifest) -> ArtifactRef:
        uri = f"{self.url}/{self.prefix(kind, name)}/{manifest.folder}"
        return ArtifactRef(kind, name, manifest.fingerprint, uri, len(manifest.files), manifest.size)


def open_store(
    url: str, namespace: str, cache: Path, limit: int | None = None, connect: Callable[[], Any] = boto3_client
) -> ArtifactStore:
    """The artifacts behind a URL.

    Args:
        url: `file:///folder` or `s3://bucket/prefix`.
        namespace: Keeps one developer's or branch's artifacts from another's.
        cache: Node-local folder for fetched artifacts.
        limit: Most bytes of artifacts that it keeps; None for no limit.
        connect: Gives a boto3 client of S3.

    Raises:
        StoreError: if URL or namespace cannot be one.
    """
    return ArtifactStore(Objects(url, connect), namespace, NodeCache(cache, limit))


class _Reader:
    """Reads a file once, for the store and for its hash."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path, self.progress = path, progress
        self.size, self._digest = 0, hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """The content from its beginning; what was counted of an earlier reading is taken back."""
        self.progress.take_back(self.size)
        self.size, self._digest = 0, hashlib.sha256()
        with open(self.path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                self._digest.update(chunk)
                self.size += len(chunk)
                self.progress.add(len(chunk))
                yield chunk


def _largest_first(sizes: Mapping[Any, int]) -> list[Any]:
    return sorted(sizes, key=lambda item: sizes[item], reverse=True)


def folder_files(folder: Path) -> dict[str, Path]:
    """Every file below a folder, by its relative path.

    Raises:
        StoreError: if one is a link that leads out of the folder.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in files.values():
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise StoreError(f"{path}: a link that leads out of its folder is not published")
    return files


def folder_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path."""
    return {name: sha256(path) for name, path in folder_files(folder).items()}
