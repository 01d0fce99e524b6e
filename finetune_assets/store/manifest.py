"""The manifest: written last, it is what makes a folder of files an artifact."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from finetune_assets.errors import UserError

FORMAT = 1


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
        folder: Where the files lie, relative to the manifest; each attempt has its own, so none overwrites another's.
        files: Every file, sorted by path.
        made_from: Fingerprints of the inputs by name, and whatever else tells where the artifact comes from.
        created: When it was published (UTC, ISO 8601).
    """

    kind: str
    fingerprint: str
    folder: str
    files: tuple[FileEntry, ...]
    made_from: dict[str, Any] = field(default_factory=dict)
    created: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True).encode()


def parse(raw: bytes, where: str) -> Manifest:
    """Read a manifest, refusing anything that could lead a reader outside the artifact.

    Raises:
        ManifestError: if it is not a manifest, of another format, or names a path that is not plain and relative.
    """
    try:
        tree = json.loads(raw)
        if tree.pop("format") != FORMAT:
            raise ManifestError(f"{where}: made by another version of this project (format is not {FORMAT})")
        files = tuple(FileEntry(**entry) for entry in tree.pop("files"))
        manifest = Manifest(files=files, **tree)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ManifestError(f"{where}: not a manifest ({e}); delete it and materialize the asset again") from e
    for path in (manifest.folder, *(entry.path for entry in files)):
        if not is_plain(path):
            raise ManifestError(f"{where}: refused, '{path}' is not a plain relative path")
    return manifest


def is_plain(path: str) -> bool:
    """Whether `path` is relative, normalised and cannot climb."""
    parts = PurePosixPath(path).parts
    unsafe = not path or path.startswith("/") or "\\" in path or "\0" in path or ".." in parts
    return not unsafe and str(PurePosixPath(path)) == path and path != "."
