"""What each asset of an experiment must be, from configuration and inputs alone, and where it lies in the store.

Nothing here asks what was materialized last: the same configuration and data lead to the same artifacts on a laptop, in
CI on an empty instance, and in production.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_assets.config.fingerprint import (
    adapter_fingerprint,
    evaluation_fingerprint,
    fingerprint,
    identity,
    plan_fingerprint,
    raw_fingerprint,
    stack_fingerprint,
    tokenized_fingerprint,
)
from finetune_assets.config.loading import Experiment
from finetune_assets.config.schema import RawDataConfig
from finetune_assets.contents import HELD_BACK, PROVENANCE
from finetune_assets.data.rows import HeldBack
from finetune_assets.data.sources import HubSource, Source, count_rows, open_source
from finetune_assets.data.texts import PACKAGED, SUFFIXES
from finetune_assets.hashing import sha256
from finetune_assets.store.artifacts import (
    ADAPTERS,
    BASE_MODELS,
    EVALUATIONS,
    IMPORTS,
    PLANS,
    RAW,
    TOKENIZED,
    ArtifactRef,
    ArtifactStore,
    folder_hashes,
)
from finetune_assets.store.base_models import BaseModelError, BaseModelSource, is_tokenizer_file, locate
from finetune_assets.store.champions import Champions, Record
from finetune_assets.store.errors import ArtifactMissing, StoreError
from finetune_assets.store.pins import Pins

NO_CHAMPION = (
    "{0} has no champion yet: materialize its champion_adapter, whose check says why none was promoted (most often too "
    "few rows for the gate: a larger data.gate_fraction helps). By hand: finetune-adapter promote {0} FINGERPRINT "
    '--reason "..."; finetune-store list names the adapters'
)


class RawLineage:
    """The raw data, which all experiments share.

    Args:
        store: Where artifacts lie.
        config: The deployment's raw data settings.
        root: What relative paths in settings are relative to.
        asks_hub: Ask the Hub what a branch is now; otherwise go by what it said last.
        version: Fingerprint of the raw data, where it is given and not found by reading the source.
        connect: Makes boto3's client, for a source on S3.
    """

    def __init__(
        self,
        store: ArtifactStore,
        config: RawDataConfig,
        root: Path,
        asks_hub: bool = False,
        version: str | None = None,
        connect: Callable[[], Any] | None = None,
    ) -> None:
        self.store, self.config, self.root, self.given, self.connect = store, config, root, version, connect
        self.pins = Pins(store, "dataset", made_by="dolly_raw", asks_hub=asks_hub)

    @cached_property
    def source(self) -> Source:
        return self._open()

    def _open(self) -> Source:
        downloads = self.store.cache.root / "downloads"
        return open_source(self.config, self.root, self.pins.commit_of, self.connect, downloads)

    def is_unchanged(self) -> bool:
        """Whether files still are what they were when they were first looked at; a commit always is."""
        source = self.source
        again = source if isinstance(source, HubSource) else self._open()
        return again.content() == self.content

    @cached_property
    def content(self) -> Any:
        """What pins the source's bytes; of files that means to read them all, so it is asked once."""
        return self.source.content()

    @cached_property
    def fingerprint(self) -> str:
        return self.given or raw_fingerprint(self.config.columns, self.content)

    def glance(self) -> str:
        """Changes whenever the raw data, or what its checks let pass, may have; reads nothing."""
        return fingerprint(settings=self._settings, glance=self.source.glance())

    def version(self) -> str:
        """Changes if and only if the raw data, or what its checks let pass, does; reads what is new."""
        return fingerprint(settings=self._settings, content=self.source.remembered())

    def rows(self) -> int:
        """Rows of the source, good and bad; reads what is new."""
        return sum(count_rows(file) for file in self.source.files())

    @property
    def _settings(self) -> Any:
        config = self.config
        allowed = [config.max_quarantine_share, asdict(config.checks)]
        return {"columns": identity(config.columns), "allowed": allowed}

    def raw(self) -> ArtifactRef:
        return self.store.resolve(RAW, self.fingerprint, made_by="dolly_raw")


@dataclass(frozen=True)
class Lineage:
    """One experiment's artifacts. Each method raises `ArtifactMissing` if one before it is not in the store.

    Attributes:
        raw: The raw data.
        experiment: The experiment.
        asks_hub: Ask the Hub what a branch of the base model is now; otherwise go by what it said last.
    """

    raw: RawLineage
    experiment: Experiment
    asks_hub: bool = False

    @property
    def store(self) -> ArtifactStore:
        return self.raw.store

    @cached_property
    def pins(self) -> Pins:
        return Pins(self.store, "model", made_by="cached_base_model", asks_hub=self.asks_hub)

    def base_source(self) -> BaseModelSource:
        model = self.experiment.config.model
        try:
            source = locate(model.base_model, model.revision, self.raw.root, self.pins.commit_of)
        except BaseModelError as e:
            raise BaseModelError(f"experiment {self.experiment.name}: {e}") from e
        if model.trust_remote_code not in (None, source.version):
            raise BaseModelError(
                f"experiment {self.experiment.name}: model.trust_remote_code is {model.trust_remote_code}, the model "
                f"is {source.version}; read the code of that version and name it, or remove the setting"
            )
        return source

    def base_name(self) -> str:
        source = self.base_source()
        return f"{source.repo}/{source.revision}"

    def base_model(self) -> ArtifactRef:
        return self.store.resolve(BASE_MODELS, self.base_name(), made_by="cached_base_model")

    def tokenized_fingerprint(self, raw: ArtifactRef, base_model: ArtifactRef) -> str:
        manifest = self.store.manifest(base_model.kind, base_model.name)
        files = {entry.path: entry.sha256 for entry in manifest.files} if manifest else {}
        tokenizer = {path: digest for path, digest in files.items() if is_tokenizer_file(path)}
        return tokenized_fingerprint(self.experiment, self.raw.config.split_salt, raw.fingerprint, tokenizer)

    def tokenized(self) -> ArtifactRef:
        name = self.tokenized_fingerprint(self.raw.raw(), self.base_model())
        return self.store.resolve(TOKENIZED, name, made_by="tokenized_dataset")

    def warm_start(self) -> ArtifactRef | None:
        """The adapter that training begins from, published first if it is a folder.

        Raises:
            StoreError: if it is neither an adapter folder nor in the store.
        """
        setting = self.experiment.config.training.warm_start
        if setting is None:
            return None
        if not setting.startswith((".", "/", "~")):
            if not re.fullmatch("[0-9a-f]{64}", setting):
                raise StoreError(
                    f"training.warm_start: '{setting}' is neither a fingerprint (64 hex digits) nor ./folder"
                )
            return self.store.resolve(ADAPTERS, setting, made_by="the adapter that training.warm_start names")
        folder = self.raw.root / Path(setting).expanduser()
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            if not (folder / name).is_file():
                raise StoreError(f"training.warm_start: {folder} holds no {name}")
        name = fingerprint(files=folder_hashes(folder))
        made_from = {"folder": setting, HELD_BACK: _held_back_of(folder)}
        return self.store.find(IMPORTS, name) or self.store.publish(folder, IMPORTS, name, name, made_from)

    def adapter_fingerprint(self, tokenized: ArtifactRef, base_model: ArtifactRef) -> str:
        begun = self.warm_start()
        return adapter_fingerprint(
            self.experiment, tokenized.fingerprint, base_model.fingerprint, begun.fingerprint if begun else None
        )

    def adapter(self) -> ArtifactRef:
        name = self.adapter_fingerprint(self.tokenized(), self.base_model())
        return self.store.resolve(ADAPTERS, name, made_by="lora_adapter")

    def plan(self, adapter: str) -> ArtifactRef | None:
        """What the training of an adapter, by its fingerprint, was expected to take, if that was asked."""
        return self.store.find(PLANS, plan_fingerprint(adapter))

    def held_back(self, *begun: ArtifactRef) -> HeldBack:
        """The rows that nothing was trained on: neither in this experiment nor in adapters that it begins from.

        An adapter from elsewhere does not say what it has seen, and is taken to have seen none of them.
        """
        data = self.experiment.config.data
        found = HeldBack(self.raw.config.split_salt, data.gate_fraction, data.val_fraction)
        for ref in begun:
            manifest = self.store.manifest(ref.kind, ref.name)
            if manifest and manifest.made_from.get(HELD_BACK):
                found &= HeldBack(**manifest.made_from[HELD_BACK])
        return found

    # ---- after training

    @property
    def champions(self) -> Champions:
        return Champions(self.store, self.experiment.name)

    def opponent(self, adapter: ArtifactRef) -> Record | None:
        """The champion that an adapter is measured against; None for the base alone.

        The champion itself was measured against the one before it when it was promoted, and is not measured again.
        """
        current = self.champions.current()
        if current is None or current.adapter != adapter.fingerprint:
            return current
        earlier = [record for record in self.champions.history() if record.adapter == current.against]
        return earlier[-1] if earlier else None

    def general_text(self) -> ArtifactRef | None:
        """The text by which forgetting is measured, published first if it is not in the store.

        Raises:
            StoreError: if there is no such file.
        """
        setting = self.experiment.config.evaluation.general_text
        if not self.experiment.config.evaluation.general_tokens:
            return None
        path = PACKAGED.get(setting) or self.raw.root / Path(setting).expanduser()
        if path.suffix not in SUFFIXES or not path.is_file():
            raise StoreError(
                f"evaluation.general_text: '{setting}' is none of {', '.join(PACKAGED)}, and no file "
                f"({' or '.join(SUFFIXES)}) either: {path}"
            )
        name = fingerprint(text=sha256(path))
        published = {"text" + path.suffix: path}
        return self.store.find(IMPORTS, name) or self.store.publish(published, IMPORTS, name, name, {"text": setting})

    def lm_eval_tasks(self) -> ArtifactRef | None:
        """The folder of `evaluation.lm_eval`, published first if it is not in the store.

        Raises:
            StoreError: if there is no such folder.
        """
        settings = self.experiment.config.evaluation.lm_eval
        if settings is None or settings.folder is None:
            return None
        folder = self.raw.root / Path(settings.folder).expanduser()
        if not folder.is_dir():
            raise StoreError(f"evaluation.lm_eval.folder: no folder {folder}")
        name = fingerprint(files=folder_hashes(folder))
        made_from = {"folder": settings.folder}
        return self.store.find(IMPORTS, name) or self.store.publish(folder, IMPORTS, name, name, made_from)

    def evaluation_fingerprint(self, adapter: ArtifactRef) -> str:
        against, text, tasks = self.opponent(adapter), self.general_text(), self.lm_eval_tasks()
        return evaluation_fingerprint(
            self.experiment,
            adapter.fingerprint,
            against.adapter if against else None,
            text.fingerprint if text else None,
            tasks.fingerprint if tasks else None,
            self.split,
        )

    @property
    def split(self) -> str:
        """Whose rows an adapter is judged by. A point of a sweep is chosen by them, which the gate's must not be."""
        return "gate" if self.experiment.sweep is None else "val"

    def evaluation(self, adapter: ArtifactRef | None = None) -> ArtifactRef:
        """Of the experiment's adapter, or of another one."""
        fingerprint = self.evaluation_fingerprint(adapter or self.adapter())
        return self.store.resolve(EVALUATIONS, fingerprint, made_by="adapter_evaluation")

    def stacked_from(self, base_model: ArtifactRef) -> dict[str, ArtifactRef]:
        """The champions that the experiment's `stack` names, by their experiments, in its order.

        Raises:
            ArtifactMissing: if one of them has none yet.
            StoreError: if one is of another base model.
        """
        assert self.experiment.config.stack is not None
        found = {}
        for name in self.experiment.config.stack.adapters:
            adapter = Champions(self.store, name).champion()
            if adapter is None:
                raise ArtifactMissing(f"stack.adapters: {NO_CHAMPION.format(name)}")
            manifest = self.store.manifest(adapter.kind, adapter.name)
            theirs = manifest.made_from.get("cached_base_model") if manifest else None
            if theirs != base_model.fingerprint:
                raise StoreError(
                    f"stack.adapters: the champion of {name} is of another base model than {self.experiment.name} "
                    f"({str(theirs)[:12]}, not {base_model.fingerprint[:12]}); stack adapters of one base and revision"
                )
            found[name] = adapter
        return found

    def stack_fingerprint(self, parts: dict[str, ArtifactRef], base_model: ArtifactRef) -> str:
        return stack_fingerprint(self.experiment, [ref.fingerprint for ref in parts.values()], base_model.fingerprint)

    def champion(self) -> ArtifactRef:
        """The adapter in service.

        Raises:
            ArtifactMissing: if none was promoted yet.
        """
        found = self.champions.champion()
        if found is None:
            raise ArtifactMissing(NO_CHAMPION.format(self.experiment.name))
        return found


def _held_back_of(adapter: Path) -> dict[str, Any] | None:
    """What the provenance of an adapter's folder says; None for one from elsewhere."""
    try:
        found = json.loads((adapter / PROVENANCE).read_text(encoding="utf-8")).get(HELD_BACK)
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) and found.keys() == {"salt", "gate", "val"} else None
