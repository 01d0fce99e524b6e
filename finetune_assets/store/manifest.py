"""The artifact manifest. It is written last: a folder of files becomes an artifact once its manifest exists."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from finetune_assets.errors import UserError

FORMAT = 2
SHA256 = re.compile("[0-9a-f]{64}")


class ManifestError(UserError):
    """A manifest is invalid, damaged or unsafe."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact.

    Attributes:
        path: Path relative to the artifact's folder, with forward slashes.
        size: Size in bytes.
        sha256: Hash of the content, 64 hex digits.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Identity, files and provenance of an artifact.

    Attributes:
        kind: Artifact kind, such as `tokenized` or `adapters`.
        fingerprint: Identity of the artifact.
        folder: Name of the folder of files, next to the manifest. Each attempt has a separate folder, so that attempts
            do not overwrite each other.
        files: All files, sorted by path.
        created: Time of publication (UTC, ISO 8601).
        made_from: Provenance: fingerprints of the inputs by name, and other records of the artifact's origin.
    """

    kind: str
    fingerprint: str
    folder: str
    files: tuple[FileEntry, ...]
    created: str
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> bytes:
        tree = {"format": FORMAT, **asdict(self)}
        return json.dumps({**tree, "digest": _digest(tree)}, indent=1, sort_keys=True).encode()


def parse(raw: bytes, where: str) -> Manifest:
    """Parse and validate a manifest, rejecting paths that lead outside the artifact.

    Args:
        raw: JSON of the manifest.
        where: Location of the manifest, for error messages.

    Raises:
        ManifestError: If it is not a manifest, has another format version or a wrong digest, or contains a path that
            is not plain and relative.
    """
    again = "delete it and materialize the asset again"
    try:
        tree = json.loads(raw)
        if tree["format"] != FORMAT:
            raise ManifestError(
                f"{where}: written by another version of this project (format is not {FORMAT}); {again}"
            )
        if tree.pop("digest") != _digest(tree):
            raise ManifestError(f"{where}: modified since it was written (digest mismatch); {again}")
        del tree["format"]
        files = tuple(FileEntry(**entry) for entry in tree.pop("files"))
        manifest = Manifest(files=files, **tree)
        datetime.fromisoformat(manifest.created)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ManifestError(f"{where}: not a manifest ({e!r}); {again}") from e
    for path in (manifest.folder, *(entry.path for entry in files)):
        if not isinstance(path, str) or not is_plain(path):
            raise ManifestError(f"{where}: unsafe path '{path}', not a plain relative path; {again}")
    if "/" in manifest.folder:
        raise ManifestError(f"{where}: unsafe folder '{manifest.folder}', not a plain folder name; {again}")
    if bad := next((entry for entry in files if not _is_plausible(entry)), None):
        raise ManifestError(f"{where}: invalid size or sha256 of '{bad.path}'; {again}")
    if len({entry.path for entry in files}) < len(files):
        raise ManifestError(f"{where}: a file is listed twice; {again}")
    return manifest


def _digest(tree: dict[str, Any]) -> str:
    """Return the digest of a manifest's content. It detects bit errors; it is no protection against an attacker."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _is_plausible(entry: FileEntry) -> bool:
    return isinstance(entry.size, int) and entry.size >= 0 and bool(SHA256.fullmatch(str(entry.sha256)))


def is_plain(path: str) -> bool:
    """Whether `path` is relative, normalized and free of `..`."""
    parts = PurePosixPath(path).parts
    unsafe = not path or path.startswith("/") or "\\" in path or "\0" in path or ".." in parts
    return not unsafe and str(PurePosixPath(path)) == path and path != "."
