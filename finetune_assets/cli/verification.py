"""Whether the files of an adapter's folder, wherever it was copied to, are those that were published."""

import re
from pathlib import Path

from finetune_assets.artifacts.kinds import ADAPTERS, STACKS
from finetune_assets.artifacts.layout import CARD, PROVENANCE, SIGNATURE, SUMS
from finetune_assets.store.errors import StoreError
from finetune_assets.store.gc import Artifact, Inventory
from finetune_assets.store.hashing import sha256
from finetune_assets.store.json_object import InvalidJson, check_types, parse_object


def against_sums(folder: Path) -> list[str]:
    """Differences between a folder and its own SHA256SUMS, one message each.

    Raises:
        StoreError: if it has none.
    """
    sums = folder / SUMS
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder")
    if not sums.is_file():
        raise StoreError(f"{folder}: has no {SUMS}, so it is not an adapter of this project, or is incomplete")
    lines = (re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in sums.read_text(encoding="utf-8").splitlines())
    wanted = {match[2]: match[1] for match in lines if match}
    return differences(folder, wanted, SUMS)


def against_manifest(folder: Path, artifact: Artifact) -> list[str]:
    """Differences between a folder and the manifest of its artifact, except in its card, which publishing extends."""
    wanted = {file.path: file.sha256 for file in artifact.manifest.files}
    problems = differences(folder, wanted, "the store's manifest")
    rewritten = (CARD, SUMS)  # `finetune adapter publish` adds the evaluation to the card
    return [problem for problem in problems if not problem.startswith(tuple(f"{name}: differs" for name in rewritten))]


def differences(folder: Path, wanted: dict[str, str], where: str) -> list[str]:
    """Files of a folder that differ from their sha256, are missing or not wanted; one message each."""
    problems = []
    for name, digest in wanted.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing, {where} names it")
        elif sha256(path) != digest:
            problems.append(f"{name}: differs from {where}")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    ignored = {SUMS, SIGNATURE, ".gitattributes"}
    problems += [f"{name}: not in {where}" for name in sorted(there - wanted.keys() - ignored)]
    return problems


def published_artifact(found: Inventory, folder: Path, namespace: str) -> Artifact | None:
    """The adapter in a namespace that a folder was copied from, by the fingerprint in its provenance.

    Raises:
        StoreError: if the folder names no fingerprint, or the namespace has several adapters of it.
    """
    try:
        provenance = parse_object((folder / PROVENANCE).read_bytes())
        check_types(provenance, {"fingerprint": str})
    except (OSError, InvalidJson) as e:
        raise StoreError(
            f"{folder / PROVENANCE}: no fingerprint of the adapter; copy the whole folder again ({e})"
        ) from e
    same = [
        artifact
        for artifact in found.artifacts
        if artifact.namespace == namespace
        and artifact.kind in (ADAPTERS.folder, STACKS.folder)
        and artifact.manifest.fingerprint == provenance["fingerprint"]
    ]
    if len(same) > 1:
        places = ", ".join(sorted(artifact.prefix for artifact in same))
        raise StoreError(f"{folder}: several adapters have its fingerprint ({places}); remove the wrong one")
    return same[0] if same else None
