"""The base model that an adapter was trained on, as recorded with the adapter."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.artifacts.imports import Import
from finetune_assets.artifacts.kinds import BASE_MODELS
from finetune_assets.artifacts.layout import NOT_ON_THE_HUB, PROVENANCE, read_object
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import StoreError

if TYPE_CHECKING:
    from finetune_assets.artifacts.lineage import Lineage

logger = logging.getLogger(__name__)
PEFT_CONFIG = "adapter_config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class RecordedBase:
    """A base model as recorded with an adapter; what is not recorded is None.

    Attributes:
        fingerprint: Fingerprint of the `cached_base_model` artifact.
        repo: `owner/name` on the Hub, `packaged/...` or `local/...`.
        revision: The commit, or the hash of a folder's content.
    """

    fingerprint: str | None = None
    repo: str | None = None
    revision: str | None = None

    @staticmethod
    def of(made_from: Mapping[str, Any]) -> "RecordedBase":
        """Read the provenance of an adapter that this project trained."""
        values = (made_from.get(name) for name in ("cached_base_model", "base_model", "revision"))
        return RecordedBase(*(value if isinstance(value, str) and value else None for value in values))

    @staticmethod
    def in_folder(folder: Path) -> "RecordedBase":
        """Read an adapter's folder: its provenance if this project trained it, otherwise PEFT's config."""
        recorded = RecordedBase.of(read_object(folder / PROVENANCE))
        if recorded.fingerprint:
            return recorded
        name, revision = (read_object(folder / PEFT_CONFIG).get(key) for key in ("base_model_name_or_path", "revision"))
        known = isinstance(name, str) and HUB_ID.fullmatch(name) and not (folder / name).exists()
        return RecordedBase(None, name if known else None, revision if known and isinstance(revision, str) else None)

    def is_base(self, store: ArtifactStore, base_model: ArtifactRef) -> bool | None:
        """Whether this is the given base model, or one with the same weights; None if that is unknown."""
        repo, _, revision = base_model.name.rpartition("/")
        if self.fingerprint:
            return self.fingerprint == base_model.fingerprint or self._has_same_weights(store, base_model)
        if self.repo is None or repo.startswith(NOT_ON_THE_HUB) or self.repo.startswith(NOT_ON_THE_HUB):
            return None
        if self.repo.lower() != repo.lower():
            return False
        return True if self.revision in (None, revision) else None

    def _has_same_weights(self, store: ArtifactStore, base_model: ArtifactRef) -> bool:
        """The same weights may have two names: a folder and its Hub repository, or two commits."""
        if self.repo is None or self.revision is None:
            return False
        recorded = _weights(store, f"{self.repo}/{self.revision}")
        return bool(recorded) and recorded == _weights(store, base_model.name)

    def __str__(self) -> str:
        return f"{self.repo or 'a base model'} ({(self.revision or self.fingerprint or 'unknown revision')[:12]})"


def check_warm_start(lineage: "Lineage", base_model: ArtifactRef, **known: ArtifactRef) -> None:
    """Check that the adapter for a warm start was trained on the experiment's base model, as far as that is recorded.

    Args:
        lineage: The experiment's artifacts.
        base_model: The experiment's base model.
        known: Other upstream artifacts that need no lookup, by asset.

    Raises:
        StoreError: if it was trained on another one.
    """
    adapter, setting = (
        lineage.warm_start(cached_base_model=base_model, **known),
        lineage.experiment.config.training.warm_start,
    )
    if isinstance(adapter, Import):
        recorded = RecordedBase.in_folder(Path(str(adapter.files)))
    elif adapter and (manifest := lineage.store.manifest(adapter.kind, adapter.name)):
        recorded = RecordedBase.of(manifest.made_from)
    else:
        return
    same = recorded.is_base(lineage.store, base_model)
    if same is False:
        raise StoreError(
            f"training.warm_start: adapter {setting} was trained on {recorded}, but the base model is "
            f"{base_model.name}; set model.base_model and model.revision to those of the adapter"
        )
    if same is None:
        logger.warning(
            "training.warm_start: the base model of adapter %s is not recorded; make sure that it was trained on %s",
            setting,
            base_model.name,
        )


def _weights(store: ArtifactStore, name: str) -> dict[str, str]:
    manifest = store.manifest(BASE_MODELS.folder, name)
    return {file.path: file.sha256 for file in manifest.files if file.path.endswith(".safetensors")} if manifest else {}
