"""What an experiment reads from outside the graph: texts, tasks, and the adapter that training starts from."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_assets.artifacts import provenance
from finetune_assets.artifacts.imports import Import, import_external
from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.artifacts.layout import HELD_BACK, PROVENANCE, read_object
from finetune_assets.artifacts.raw_lineage import RawLineage
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.config.loading import Experiment
from finetune_assets.data.rows import HoldoutRows
from finetune_assets.data.texts import PACKAGED, SUFFIXES
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import StoreError
from finetune_assets.store.hashing import folder_hashes, sha256


@dataclass(frozen=True)
class ExternalInputs:
    """External inputs of one experiment.

    Attributes:
        raw: The raw data.
        experiment: The experiment.
    """

    raw: RawLineage
    experiment: Experiment

    @property
    def store(self) -> ArtifactStore:
        return self.raw.store

    def published(self, inputs: Mapping[str, ArtifactRef | Import | None]) -> dict[str, ArtifactRef]:
        """Publish the given inputs that the store does not have yet; inputs that are None are left out."""
        return {
            name: item if isinstance(item, ArtifactRef) else import_external(self.store, item)
            for name, item in inputs.items()
            if item
        }

    def named_warm_start(self) -> ArtifactRef | Import | None:
        """The adapter that `training.warm_start` names, in the store or in a folder.

        Raises:
            StoreError: if the setting names neither an adapter in the store nor an adapter folder.
        """
        setting = self.experiment.config.training.warm_start
        if setting is None:
            return None
        if not setting.startswith((".", "/", "~")):
            if not re.fullmatch("[0-9a-f]{64}", setting):
                raise StoreError(
                    f"training.warm_start: '{setting}' is neither a fingerprint (64 hex digits) nor ./folder"
                )
            return self.store.resolve(ADAPTERS.folder, setting, made_by="the adapter that training.warm_start names")
        folder = self.raw.root / Path(setting).expanduser()
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            if not (folder / name).is_file():
                raise StoreError(f"training.warm_start: {folder} contains no {name}")
        made_from = {"folder": setting, HELD_BACK: _held_back_of(folder)}
        hashes = folder_hashes(folder)
        return Import(fingerprint(files=hashes), folder, made_from, hashes)

    def general_text(self) -> Import | None:
        """The text for measuring forgetting; None if the measurement is disabled.

        Raises:
            StoreError: if the file does not exist.
        """
        setting = self.experiment.config.evaluation.general_text
        if not self.experiment.config.evaluation.general_tokens:
            return None
        path = PACKAGED.get(setting) or self.raw.root / Path(setting).expanduser()
        if path.suffix not in SUFFIXES or not path.is_file():
            raise StoreError(
                f"evaluation.general_text: '{setting}' is neither a packaged text ({', '.join(PACKAGED)}) nor a file "
                f"({' or '.join(SUFFIXES)}): {path}"
            )
        name, digest = "text" + path.suffix, sha256(path)
        return Import(fingerprint(text=digest), {name: path}, {"text": setting}, {name: digest})

    def lm_eval_tasks(self) -> Import | None:
        """The task folder of `evaluation.lm_eval`, if set.

        Raises:
            StoreError: if the folder does not exist.
        """
        settings = self.experiment.config.evaluation.lm_eval
        if settings is None or settings.folder is None:
            return None
        folder = self.raw.root / Path(settings.folder).expanduser()
        if not folder.is_dir():
            raise StoreError(f"evaluation.lm_eval.folder: folder {folder} does not exist")
        hashes = folder_hashes(folder)
        return Import(fingerprint(files=hashes), folder, {"folder": settings.folder}, hashes)

    def held_back(self, *begun: ArtifactRef) -> HoldoutRows:
        """Rows not used for training, neither in this experiment nor for the adapters that it starts from.

        An adapter from another source has no record of its training rows; it is assumed to have seen none of these.
        """
        data = self.experiment.config.data
        holdout = HoldoutRows(self.raw.config.split_salt, data.gate_fraction, data.val_fraction)
        for ref in begun:
            manifest = self.store.manifest(ref.kind, ref.name)
            if manifest and manifest.made_from.get(HELD_BACK):
                unseen = provenance.held_back(manifest.made_from)
                holdout &= unseen or HoldoutRows(holdout.salt, 0.0, 0.0)
        return holdout


def _held_back_of(adapter: Path) -> dict[str, Any] | None:
    """Held-out rows from the provenance in an adapter's folder; None if it has no such record."""
    holdout = provenance.held_back(read_object(adapter / PROVENANCE))
    return asdict(holdout) if holdout else None
