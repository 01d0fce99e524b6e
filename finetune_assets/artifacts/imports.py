"""Imports from outside the graph: an adapter for a warm start, texts and tasks for evaluations.

Each import is identified by its content. `Import` describes it; only `import_external` publishes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_assets.artifacts.kinds import IMPORTS
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore


@dataclass(frozen=True)
class Import:
    """A local file or folder to import.

    Attributes:
        fingerprint: Fingerprint of the content.
        files: The folder, or the files by their names in the store.
        made_from: Provenance.
        hashes: sha256 of each file, by its name in the store.
    """

    fingerprint: str
    files: Path | Mapping[str, Path] = field(repr=False)
    made_from: Mapping[str, Any] = field(repr=False)
    hashes: Mapping[str, str] = field(repr=False)


def import_external(store: ArtifactStore, item: Import) -> ArtifactRef:
    """Publish an import, unless the store already has it.

    Raises:
        ForeignContent: If the store has other files under its name.
    """
    name = item.fingerprint
    return store.find(IMPORTS.folder, name, item.hashes) or store.publish(
        item.files, IMPORTS.folder, name, name, item.made_from, expected=item.hashes
    )
