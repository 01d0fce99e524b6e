"""The manifest: written last, it is what makes a folder of files an artifact."""

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
    """A manifest that cannot be trusted."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact.

    Attributes:
        path: Relative to the artifact's folder, with forward slashes.
        size: Bytes.
        sha256: Of the content, 64 hex digits.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it holds, and what it was made from.

    Attributes:
        kind: Such as `tokenized` or `adapters`.
        fingerprint: The identity that the artifact was made under.
        folder: Name of the folder of the files, beside the manifest; each attempt has its own, so none overwrites
            another's.
        files: Every file, sorted by path.
        created: When it was published (UTC, ISO 8601).
        made_from: Fingerprints of the inputs by name, and whatever else tells where the artifact comes from.
    """

    kind: str
    fingerprint: str
    folder: str
    files: tuple[FileEntry, ...]
    created: str
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> bytes:
        tree = {"format": FORMAT, **asdict(self)}
        return json.dumps({**tree, "digest": _digest(tree)}, indent=1, sort_keys=True).encode()


def parse(raw: bytes, where: str) -> Manifest:
    """Read a manifest, refusing anything that could lead a reader outside the artifact.

    Raises:
        ManifestError: if it is not a manifest, of another format, not as it was written, or names a path that is not
            plain and relative.
    """
    again = "delete it and materialize the asset again"
    try:
        tree = json.loads(raw)
        if tree["format"] != FORMAT:
            raise ManifestError(f"{where}: made by another version of this project (format is not {FORMAT}); {again}")
        if tree.pop("digest") != _digest(tree):
            raise ManifestError(f"{where}: not as it was written (its digest differs); {again}")
        del tree["format"]
        files = tuple(FileEntry(**entry) for entry in tree.pop("files"))
        manifest = Manifest(files=files, **tree)
        datetime.fromisoformat(manifest.created)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ManifestError(f"{where}: not a manifest ({e!r}); {again}") from e
    for path in (manifest.folder, *(entry.path for entry in files)):
        if not isinstance(path, str) or not is_plain(path):
            raise ManifestError(f"{where}: refused, '{path}' is not a plain relative path")
    if "/" in manifest.folder:
        raise ManifestError(f"{where}: refused, '{manifest.folder}' is not a plain name of a folder")
    if bad := next((entry for entry in files if not _is_plausible(entry)), None):
        raise ManifestError(f"{where}: refused, size or sha256 of '{bad.path}' cannot be; {again}")
    if len({entry.path for entry in files}) < len(files):
        raise ManifestError(f"{where}: refused, it names a file twice; {again}")
    return manifest


def _digest(tree: dict[str, Any]) -> str:
    """Of everything that a manifest says, so that a changed bit is noticed; it proves nothing against an attacker."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _is_plausible(entry: FileEntry) -> bool:
    return isinstance(entry.size, int) and entry.size >= 0 and bool(SHA256.fullmatch(str(entry.sha256)))


def is_plain(path: str) -> bool:
    """Whether `path` is relative, normalised and cannot climb."""
    parts = PurePosixPath(path).parts
    unsafe = not path or path.startswith("/") or "\\" in path or "\0" in path or ".." in parts
    return not unsafe and str(PurePosixPath(path)) == path and path != "."
