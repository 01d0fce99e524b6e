"""What an experiment brings from outside of the graph: an adapter for a warm start, texts and tasks for evaluations.

Each is identified by its content. `Import` says what it is; only `import_external` publishes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_assets.artifacts.kinds import IMPORTS
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore


@dataclass(frozen=True)
class Import:
    """A file or folder of this machine.

    Attributes:
        fingerprint: Of its content.
        files: The folder, or the files by the names that they get in the store.
        made_from: Its provenance.
    """

    fingerprint: str
    files: Path | Mapping[str, Path] = field(repr=False)
    made_from: Mapping[str, Any] = field(repr=False)


def import_external(store: ArtifactStore, item: Import) -> ArtifactRef:
    """Publish an import unless the store has it."""
    name = item.fingerprint
    return store.find(IMPORTS.folder, name) or store.publish(item.files, IMPORTS.folder, name, name, item.made_from)
