"""Publish folders as artifacts, look them up by name, and fetch them, verified, into a node-local cache.

Files are uploaded first and the manifest last, with a create-only write: an artifact is either complete or absent.
"""

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_assets.progress import Progress, in_parallel
from finetune_assets.store import modes
from finetune_assets.store.cache import Entry, NodeCache
from finetune_assets.store.errors import ArtifactMissing, CorruptArtifact, ForeignContent, StoreError, UnreadableObject
from finetune_assets.store.hashing import folder_files
from finetune_assets.store.hashing_reader import HashingReader
from finetune_assets.store.json_object import MOST_BYTES, MOST_FILE_BYTES
from finetune_assets.store.manifest import FileEntry, Manifest, ManifestError, check_belongs, check_files, parse
from finetune_assets.store.objects import ObjectStorage, boto3_client
from finetune_assets.store.reference import ArtifactRef

MANIFEST = "manifest.json"
CHECKPOINTS, JOBS = "checkpoints", "jobs"
SHARED = "base-models"
"""The artifact kind shared by all namespaces."""
CLAIM = "claim.json"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
ATTEMPT = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


class ArtifactStore:
    """Artifact store below one URL.

    Args:
        objects: Object storage at the URL.
        namespace: Isolates the artifacts of a developer or branch. Base models are shared by all namespaces.
        cache: Node-local cache of fetched artifacts.
    """

    def __init__(self, objects: ObjectStorage, namespace: str, cache: NodeCache) -> None:
        if not re.fullmatch(NAME, namespace):
            raise StoreError(
                f"FINETUNE_NAMESPACE: '{namespace}' is invalid; use letters, digits, '.', '_' and '-', starting with a "
                "letter or a digit"
            )
        if namespace == SHARED:
            raise StoreError(
                f"FINETUNE_NAMESPACE: '{namespace}' is reserved for the shared base models; choose another name"
            )
        self.objects, self.namespace, self.cache = objects, namespace, cache

    @property
    def url(self) -> str:
        return self.objects.url

    def find(self, kind: str, name: str, expected: Mapping[str, str] | None = None) -> ArtifactRef | None:
        """Return the artifact with this name, or None.

        Args:
            kind: Artifact kind, such as `tokenized`.
            name: Path below the kind.
            expected: sha256 of every file, by path in the artifact, where it is known.

        Raises:
            ForeignContent: If the artifact has other files than `expected`.
        """
        manifest = self.manifest(kind, name)
        if manifest and expected is not None:
            check_files(manifest, expected, f"{self.url}/{self.prefix(kind, name)}")
        return self.ref(kind, name, manifest) if manifest else None

    def resolve(self, kind: str, name: str, made_by: str, expected: Mapping[str, str] | None = None) -> ArtifactRef:
        """Return the artifact with this name.

        Args:
            kind: Artifact kind, such as `tokenized`.
            name: Path below the kind.
            made_by: Asset to materialize first, for the error message.
            expected: sha256 of every file, by path in the artifact, where it is known.

        Raises:
            ArtifactMissing: If the store has no such artifact.
            ForeignContent: If the artifact has other files than `expected`.
        """
        ref = self.find(kind, name, expected)
        if ref is None:
            raise self.missing(kind, name, made_by)
        return ref

    def missing(self, kind: str, name: str, made_by: str) -> ArtifactMissing:
        """Return the error for an artifact that the store does not have."""
        return ArtifactMissing(
            f"Artifact not found: {self.url}/{self.prefix(kind, name)}. Materialize {made_by} first, with the same "
            "settings and overrides"
        )

    def manifest(self, kind: str, name: str) -> Manifest | None:
        """Return the validated manifest of an artifact, or None.

        Raises:
            ManifestError: If the manifest is invalid or belongs to another artifact.
        """
        key = f"{self.prefix(kind, name)}/{MANIFEST}"
        try:
            manifest = self._parsed(key)
        except FileNotFoundError:
            return None
        check_belongs(manifest, kind, "" if kind == SHARED else name, f"{self.url}/{key}")
        return manifest

    def _parsed(self, key: str) -> Manifest:
        try:
            return parse(self.objects.get(key, MOST_BYTES), f"{self.url}/{key}")
        except ManifestError:  # a second read corrects a byte flipped in transit
            return parse(self.objects.get(key, MOST_BYTES), f"{self.url}/{key}")

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
        """Upload files in parallel, then write their manifest.

        If another writer published first, its artifact is returned and the files uploaded here are removed, unless
        `replace` is set.

        Args:
            files: A folder to publish recursively, or local files by their path in the artifact.
            kind: Artifact kind, such as `tokenized`.
            name: Path below the kind.
            fingerprint: Identity of the content.
            made_from: Provenance recorded in the manifest.
            replace: Replace an existing artifact with this name.
            expected: Known sha256 of every file, by path in the artifact.

        Returns:
            Reference to the published artifact.

        Raises:
            StoreError: If there are no files, a file is a link to outside the folder or changes during the upload, or
                the store rejects the upload.
            ForeignContent: If the store has an artifact of this name with other files than `expected`.
        """
        if not replace and (published := self.find(kind, name, expected)):
            return published
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
        if len(manifest.to_json()) > MOST_BYTES:
            self._forget(keys)
            raise StoreError(f"{prefix}: {len(entries):,} files are too many for one artifact; pack them into fewer")
        # If this write fails, the manifest may exist or not, so the files are kept; garbage collection decides later
        if replace:
            self.objects.put(f"{prefix}/{MANIFEST}", manifest.to_json())
        elif not self.objects.create(f"{prefix}/{MANIFEST}", manifest.to_json()):
            self._forget(keys)
            return self.resolve(kind, name, kind, expected)
        return self.ref(kind, name, manifest)

    def _upload(
        self, what: str, prefix: str, sources: Mapping[str, Path], expected: Mapping[str, str]
    ) -> tuple[FileEntry, ...]:
        sizes = {path: source.stat().st_size for path, source in sources.items()}
        hashes: dict[str, str] = {}
        with Progress(what, sum(sizes.values())) as progress:

            def upload(path: str) -> None:
                reader = HashingReader(sources[path], progress)
                self.objects.upload(f"{prefix}/{path}", sizes[path], reader.chunks)
                if reader.size != sizes[path] or reader.sha256 != expected.get(path, reader.sha256):
                    raise StoreError(f"File changed during upload: {sources[path]}. Materialize the asset again")
                hashes[path] = reader.sha256

            in_parallel([lambda path=path: upload(path) for path in _largest_first(sizes)], progress)  # type: ignore[misc]
        return tuple(FileEntry(path, sizes[path], hashes[path]) for path in sorted(sizes))

    def _forget(self, keys: list[str]) -> None:
        """Delete the files of a failed publication; files that cannot be deleted are left for garbage collection."""
        with suppress(StoreError, OSError):
            self.objects.delete(keys)

    def fetch(self, ref: ArtifactRef, only: Callable[[str], bool] = lambda path: True) -> Path:
        """Fetch an artifact into the node-local cache, verifying each file during the copy.

        The entry stays in the cache while this process lives. A cached artifact needs no request to the store.

        Args:
            ref: The artifact.
            only: Predicate on a file's path that selects the files to fetch.

        Returns:
            Local folder with the artifact's files.

        Raises:
            ArtifactMissing: If the artifact is not, or no longer, in the store.
            CorruptArtifact: If the size or sha256 of a file differs from its manifest, even after a second fetch.
            StoreError: If the store does not respond, or the cache has no room.
        """
        prefix = self.prefix(ref.kind, ref.name)
        entry = self.cache.entry(prefix, ref.attempt)
        entry.hold()
        manifest = self._cached(entry, ref)
        if manifest and entry.serves(manifest, only):
            return entry.folder
        with self.cache.filling(entry, f"fetching {ref.kind}/{ref.name}"):
            manifest = self._cached(entry, ref) or self._manifest_of(ref)
            if manifest.folder == ref.attempt:
                try:
                    self._fill(prefix, entry, manifest, only)
                except OSError as e:
                    raise StoreError(
                        f"Cannot write to {entry.folder} ({e.strerror or e}); check FINETUNE_CACHE and the free space"
                    ) from e
                return entry.folder
        return self.fetch(self.ref(ref.kind, ref.name, manifest), only)  # replaced in the meantime

    def read(self, kind: str, name: str, manifest: Manifest, path: str) -> bytes:
        """Read and verify a small file of an artifact.

        Bypasses the cache, which is not designed for single files of many artifacts.

        Raises:
            CorruptArtifact: If the file is missing or differs from the manifest, even after a second read.
        """
        key = f"{self.prefix(kind, name)}/{manifest.folder}/{path}"
        wanted = next((file.sha256 for file in manifest.files if file.path == path), None)
        with suppress(FileNotFoundError):
            for _ in range(2 if wanted else 0):
                content = self.objects.get(key, MOST_FILE_BYTES)
                if hashlib.sha256(content).hexdigest() == wanted:
                    return content
        raise CorruptArtifact(f"{self.url}/{key}: missing, or differs from its manifest; materialize again with force")

    def _cached(self, entry: Entry, ref: ArtifactRef) -> Manifest | None:
        """Return the manifest of a cache entry if it is that of the reference."""
        manifest = entry.manifest()
        if manifest is None or ref.content not in ("", manifest.content):
            return None
        named = (manifest.kind, manifest.fingerprint, manifest.folder)
        return manifest if named == (ref.kind, ref.fingerprint, ref.attempt) else None

    def _manifest_of(self, ref: ArtifactRef) -> Manifest:
        manifest = self.manifest(ref.kind, ref.name)
        if manifest is None or manifest.fingerprint != ref.fingerprint:
            raise ArtifactMissing(f"{ref.uri}: no longer in the store; materialize it again")
        # An artifact may be replaced in the meantime, but a base model is shared, and was compared with its source
        bound = ref.kind == SHARED or manifest.folder == ref.attempt
        if bound and ref.content not in ("", manifest.content):
            raise ForeignContent(
                f"{ref.uri}: its manifest was changed after this run had read it, and names other files; check who may "
                "write there, then run again"
            )
        return manifest

    def _fill(self, prefix: str, entry: Entry, manifest: Manifest, only: Callable[[str], bool]) -> None:
        for path in entry.unexpected(manifest):
            path.unlink()
        absent = entry.missing(manifest, manifest.files)
        missing = [file for file in absent if only(file.path)]
        coming = sum(file.size for file in missing)
        here = manifest.size - sum(file.size for file in absent)
        self.cache.make_room(entry, here + coming, coming)
        modes.write_file(entry.manifest_file, manifest.to_json())
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
            raise CorruptArtifact(f"{where}: listed in the manifest but missing from the store; {again}") from e

    def _read(self, key: str, file: FileEntry, progress: Progress, target: Path | str = os.devnull) -> bool:
        """Copy a file of the store to `target`.

        A file that differs from the manifest is read a second time, which corrects a byte flipped in transit.

        Returns:
            True if size and sha256 match the manifest.

        Raises:
            FileNotFoundError: If the store has no such file.
        """
        return any(self.objects.with_retries(key, lambda: self._copy(key, file, progress, target)) for _ in range(2))

    def _copy(self, key: str, file: FileEntry, progress: Progress, target: Path | str) -> bool:
        digest, size, whole = hashlib.sha256(), 0, False
        try:
            # Buffered: on a nearly full disk a raw write may write fewer bytes and only report this by its return value
            with open(target, "wb", opener=modes.private) as out:
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
        """Read every file of an artifact from the store and compare it with the manifest.

        Returns:
            Sorted paths of the files that are missing or differ from the manifest.

        Raises:
            ArtifactMissing: If the store has no such artifact.
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
                except (FileNotFoundError, UnreadableObject):
                    whole = False
                if not whole:
                    bad.append(file.path)

            in_parallel([lambda file=file: read(file) for file in manifest.files], progress)  # type: ignore[misc]
        return sorted(bad)

    def prefix(self, kind: str, name: str) -> str:
        """Return the key prefix of an artifact's manifest and attempts, relative to the store's URL."""
        return f"{kind}/{name}" if kind == SHARED else f"{self.namespace}/{kind}/{name}"

    def ref(self, kind: str, name: str, manifest: Manifest) -> ArtifactRef:
        uri = f"{self.url}/{self.prefix(kind, name)}/{manifest.folder}"
        return ArtifactRef(kind, name, manifest.fingerprint, uri, len(manifest.files), manifest.size, manifest.content)


def open_store(
    url: str, namespace: str, cache: Path, limit: int | None = None, connect: Callable[[], Any] = boto3_client
) -> ArtifactStore:
    """Open the artifact store at a URL.

    Args:
        url: `file:///folder` or `s3://bucket/prefix`.
        namespace: Isolates the artifacts of a developer or branch.
        cache: Node-local folder for fetched artifacts.
        limit: Maximum size of the cached artifacts in bytes; None for no limit.
        connect: Returns a boto3 S3 client.

    Raises:
        StoreError: If the URL or the namespace is invalid.
    """
    return ArtifactStore(ObjectStorage(url, connect), namespace, NodeCache(cache, limit))


def _largest_first(sizes: Mapping[Any, int]) -> list[Any]:
    return sorted(sizes, key=lambda item: sizes[item], reverse=True)
