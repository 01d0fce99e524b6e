"""The artifact manifest. It is written last: a folder of files becomes an artifact once its manifest exists."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from finetune_assets.errors import UserError
from finetune_assets.store.errors import ForeignContent
from finetune_assets.store.json_object import MOST_INTEGER, InvalidJson, check_time, check_types, parse_object

FORMAT = 2
FIELDS = {"kind": str, "fingerprint": str, "folder": str, "files": list, "created": str, "made_from": dict}
MOST_CHARACTERS = 400
"""Longest kind, fingerprint and folder."""
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

    @property
    def content(self) -> str:
        """Hash of the paths and hashes of the files."""
        return _digest({"files": {file.path: file.sha256 for file in self.files}})

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
    try:
        return _parsed(parse_object(raw))
    except InvalidJson as e:
        raise ManifestError(f"{where}: {e}; delete it and materialize the asset again") from None


def _parsed(tree: dict[str, Any]) -> Manifest:
    if tree.get("format") != FORMAT:
        raise InvalidJson(f"not a manifest, or written by another version of this project (format is not {FORMAT})")
    if tree.pop("digest", None) != _digest(tree):
        raise InvalidJson("modified since it was written (digest mismatch)")
    del tree["format"]
    tree.setdefault("made_from", {})
    check_types(tree, FIELDS)
    if unknown := sorted(tree.keys() - FIELDS.keys()):
        raise InvalidJson(f"unknown field '{unknown[0][:60]}'")
    for name in ("kind", "fingerprint", "folder"):
        if not is_plain(tree[name]) or not tree[name].isprintable() or len(tree[name]) > MOST_CHARACTERS:
            raise InvalidJson(f"unsafe {name} {_quoted(tree[name])}, not a plain relative path")
    if "/" in tree["folder"]:
        raise InvalidJson(f"unsafe folder '{tree['folder'][:60]}', not a plain folder name")
    check_time(tree["created"])
    files = tuple(_file(entry) for entry in tree.pop("files"))
    if len({entry.path for entry in files}) < len(files):
        raise InvalidJson("a file is listed twice")
    return Manifest(files=files, **tree)


def _file(entry: Any) -> FileEntry:
    if not isinstance(entry, dict) or entry.keys() != {"path", "size", "sha256"}:
        raise InvalidJson(f"a file is not described by path, size and sha256: {str(entry)[:60]!r}")
    check_types(entry, {"path": str, "size": int, "sha256": str})
    path, size = entry["path"], entry["size"]
    if not is_plain(path):
        raise InvalidJson(f"unsafe path {_quoted(path)}, not a plain relative path")
    if not 0 <= size < MOST_INTEGER or not SHA256.fullmatch(entry["sha256"]):
        raise InvalidJson(f"invalid size or sha256 of {_quoted(path)}")
    return FileEntry(path, size, entry["sha256"])


def _quoted(text: str) -> str:
    return f"'{text[:100]}'" if text.isprintable() else repr(text[:100])


def check_belongs(manifest: Manifest, kind: str, fingerprint: str, where: str) -> None:
    """Check that a manifest is that of the artifact at whose place it is stored.

    Args:
        manifest: The manifest.
        kind: Kind of the artifact.
        fingerprint: Fingerprint of the artifact; empty if its name is none.
        where: Location of the manifest, for error messages.

    Raises:
        ManifestError: If it belongs to another artifact.
    """
    if manifest.kind != kind or fingerprint not in ("", manifest.fingerprint):
        raise ManifestError(f"{where}: this manifest belongs to another artifact ({manifest.fingerprint})")


def check_files(manifest: Manifest, expected: Mapping[str, str], where: str) -> None:
    """Compare a manifest with the known hashes of the artifact's files.

    Args:
        manifest: The manifest.
        expected: sha256 of every file, by path.
        where: Location of the artifact, for error messages.

    Raises:
        ForeignContent: naming the first file that differs.
    """
    actual = {file.path: file.sha256 for file in manifest.files}
    if actual != expected:
        path = min(path for path in actual.keys() | expected.keys() if actual.get(path) != expected.get(path))
        found, known = (hashes.get(path, "no such file")[:12] for hashes in (actual, expected))
        raise ForeignContent(
            f"{where}: {path} does not have the content that the name of this artifact identifies (sha256 {found}, "
            f"expected {known}); somebody else wrote it, and it is not used. Check who may write there, then "
            "materialize the asset again with force"
        )


def _digest(tree: dict[str, Any]) -> str:
    """Return the digest of a manifest's content. It detects bit errors; it is no protection against an attacker."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def is_plain(path: str) -> bool:
    """Whether `path` is relative, normalized and free of `..`."""
    parts = PurePosixPath(path).parts
    unsafe = not path or path.startswith("/") or "\\" in path or "\0" in path or ".." in parts
    return not unsafe and str(PurePosixPath(path)) == path and path != "."
