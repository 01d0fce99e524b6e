"""Determines the artifact of each asset of an experiment from configuration and inputs alone.

Nothing here depends on past materializations: the same configuration and data lead to the same artifacts on a laptop,
in CI on an empty instance, and in production. Only `import_external_inputs` publishes artifacts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune_assets.artifacts import provenance
from finetune_assets.artifacts.aliases import canonical
from finetune_assets.artifacts.base_check import find_base_model
from finetune_assets.artifacts.champions import Champions, Record
from finetune_assets.artifacts.document_lineage import DocumentLineage
from finetune_assets.artifacts.external_inputs import ExternalInputs
from finetune_assets.artifacts.imports import Import
from finetune_assets.artifacts.kinds import (
    ADAPTERS,
    BASE_MODELS,
    EVALUATIONS,
    INDEXES,
    KIND_OF,
    OF_CHAMPION,
    PLANS,
    RAW,
    STACKS,
    TOKENIZED,
    ArtifactKind,
)
from finetune_assets.artifacts.layout import CHAMPION_AT_START, SOURCES
from finetune_assets.artifacts.raw_lineage import refuse_missing_sources
from finetune_assets.artifacts.streams import earlier_versions
from finetune_assets.config.documents import load_documents
from finetune_assets.sources.base_models import BaseModelError, BaseModelSource, is_tokenizer_file, locate
from finetune_assets.sources.names import source_name
from finetune_assets.sources.pins import Pins
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.errors import ArtifactMissing, StoreError

CHAMPION = "champion"
"""Value of settings that name the champion at the start of the training."""
NO_CHAMPION = (
    "{0} has no champion yet: materialize its champion_adapter; its check reports why no adapter was promoted (usually "
    "too few gate rows: increase data.gate_fraction). To promote manually: finetune adapter promote {0} FINGERPRINT "
    '--reason "..."; finetune store list shows the adapters'
)


@dataclass(frozen=True)
class Lineage(ExternalInputs):
    """The artifacts of one experiment. Methods raise `ArtifactMissing` if an upstream artifact is not in the store.

    Attributes:
        raw: The raw data.
        experiment: The experiment.
        asks_hub: Resolve a branch of the base model on the Hub; otherwise use the recorded commit.
        index_version: Fingerprint of the retrieval index of the experiment's document set, or `NO_GOOD_INDEX`; computed
            by reading the documents if not given.
    """

    asks_hub: bool = False
    index_version: str | None = None

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

    @property
    def trusts_own_code(self) -> bool:
        """Whether the settings trust the base model's own code; `base_source` compares its version."""
        return self.experiment.config.model.trust_remote_code is not None

    def find_base_model(self, name: str) -> ArtifactRef | None:
        """A base model whose files were compared with what is known of them, or None; see `base_check`."""
        return find_base_model(self.pins, name, self.experiment.config.model.trust_remote_code)

    def fingerprint(self, kind: ArtifactKind, **known: ArtifactRef) -> str:
        """Fingerprint of the experiment's artifact of a kind.

        Args:
            kind: Artifact kind.
            known: Upstream artifacts that need no lookup, by asset.
        """
        return kind.fingerprint(self.experiment.config, **self._inputs(kind, known))

    def earlier_fingerprints(self, kind: ArtifactKind, **known: ArtifactRef) -> list[str]:
        """Fingerprints of the same artifact under earlier code versions."""
        return kind.earlier_fingerprints(self.experiment.config, **self._inputs(kind, known))

    def expected(self, kind: ArtifactKind) -> ArtifactRef:
        """The experiment's artifact of a kind."""
        if kind is RAW:
            return self.raw.raw()
        if kind in OF_CHAMPION:
            return self.champion()
        if kind is BASE_MODELS:
            source = self.base_source()
            name = f"{source.repo}/{source.revision}"
            if ref := self.find_base_model(name):
                return ref
            raise self.store.missing(kind.folder, name, made_by=kind.asset or kind.folder)
        if kind is INDEXES:
            if index := self.index():
                return index
            raise ArtifactMissing(f"experiment {self.experiment.name} retrieves nothing: data.retrieval is not set")
        if kind is ADAPTERS:
            return self.adapter()
        return self._stored(kind)

    def _stored(self, kind: ArtifactKind) -> ArtifactRef:
        name = self.fingerprint(kind)
        return canonical(self.store, self.store.resolve(kind.folder, name, made_by=kind.asset or kind.folder))

    def adapter(self) -> ArtifactRef:
        """The adapter to evaluate: that of the current settings and inputs.

        After a change of the documents alone, an experiment with `data.retrieval.retrain: false` is not trained again;
        its champion is then evaluated with the new index.
        """
        try:
            return self._stored(ADAPTERS)
        except ArtifactMissing:
            retrieval = self.experiment.config.data.retrieval
            champion = self.champions.champion() if retrieval and not retrieval.retrain else None
            if champion is None or self.experiment.overrides:
                raise
            return champion

    @cached_property
    def documents(self) -> DocumentLineage | None:
        """The document set that the experiment retrieves from; None without `data.retrieval`."""
        retrieval = self.experiment.config.data.retrieval
        if retrieval is None:
            return None
        config = load_documents(self.raw.configs, retrieval.documents)
        return DocumentLineage(retrieval.documents, config, self.raw, version=self.index_version)

    def index(self) -> ArtifactRef | None:
        """The retrieval index that the experiment's rows are retrieved from; None without `data.retrieval`."""
        return self.documents.index() if self.documents else None

    def version_without_index(self, **known: ArtifactRef) -> str:
        """A version of the tokenized dataset that a change of the documents alone does not change."""
        inputs = {name: self._input(name, known) for name in TOKENIZED.inputs if name != INDEXES.asset}
        return TOKENIZED.fingerprint(self.experiment.config, **inputs, retrieval_index="")

    def _inputs(self, kind: ArtifactKind, known: Mapping[str, ArtifactRef]) -> dict[str, Any]:
        return {name: self._input(name, known) for name in kind.inputs}

    def _input(self, name: str, known: Mapping[str, ArtifactRef]) -> Any:
        """The value of one fingerprint input: an asset's fingerprint, or a value from outside the graph."""
        if name in LOOKED_UP:
            return LOOKED_UP[name](self, known)
        return self._upstream(name, known).fingerprint

    def _upstream(self, asset: str, known: Mapping[str, ArtifactRef]) -> ArtifactRef:
        return known.get(asset) or self.expected(KIND_OF[asset])

    def selected_sources(self, raw: ArtifactRef | None = None) -> dict[str, ArtifactRef]:
        """The version of each source that the experiment uses, by name, in the order of the names.

        Args:
            raw: The raw data; by default, that of this run.

        Raises:
            ArtifactMissing: if a source was not read, or is not configured.
        """
        refuse_missing_sources(self.experiment, self.raw.config)
        parts = self.raw.parts(raw or self.raw.raw())
        wanted = self.experiment.config.data.sources
        for name in self.raw.sources if wanted is None else wanted:
            if name not in parts:
                known = ", ".join(sorted(parts))
                raise ArtifactMissing(
                    f"experiment {self.experiment.name}: the raw data has no source '{name}', only {known}; "
                    "see `sources` in raw_data.yaml and data.sources, and the log of dolly_raw"
                )
        names = sorted(parts) if wanted is None else sorted({*wanted})
        return {name: self.store.resolve(RAW.folder, parts[name], made_by="dolly_raw") for name in names}

    def source_names(self) -> list[str]:
        """Where the rows of the selected sources come from."""
        wanted = self.experiment.config.data.sources
        sources = self.raw.sources.items()
        return sorted({source.source_name for name, source in sources if wanted is None or name in wanted})

    def replayed(self, selected: Mapping[str, ArtifactRef]) -> list[ArtifactRef]:
        """Earlier versions of the selected sources, whose rows `data.replay` adds."""
        if not self.experiment.config.data.replay:
            return []
        versions = (
            earlier_versions(self.store, self.raw.sources[name].stream, ref.fingerprint)
            for name, ref in selected.items()
        )
        return [ref for refs in versions for ref in refs]

    def mixture(self, selected: Mapping[str, ArtifactRef]) -> dict[str, dict[str, float | int | None]]:
        """Weight and maximum number of rows of the selected sources, by name; empty if all rows are used."""
        parts = {name: self.raw.config.sources.get(name) for name in selected}
        total = sum(part.weight or 0 for part in parts.values() if part)
        mix = {
            name: {"weight": part.weight / total if part.weight and len(parts) > 1 else None, "max_rows": part.max_rows}
            for name, part in parts.items()
            if part
        }
        return mix if any(value is not None for part in mix.values() for value in part.values()) else {}

    def tokenizer(self, base_model: ArtifactRef) -> dict[str, str]:
        """sha256 of each tokenizer file of a base model, by path."""
        manifest = self.store.manifest(base_model.kind, base_model.name)
        files = {entry.path: entry.sha256 for entry in manifest.files} if manifest else {}
        return {path: digest for path, digest in files.items() if is_tokenizer_file(path)}

    def plan(self, adapter: str) -> ArtifactRef | None:
        """The plan of an adapter's training, by the adapter's fingerprint; None if it was not planned."""
        name = PLANS.fingerprint(self.experiment.config, lora_adapter=adapter)
        return self.store.find(PLANS.folder, name)

    # ---- inputs from outside the graph

    def import_external_inputs(self, **known: ArtifactRef) -> dict[str, ArtifactRef]:
        """Publish the experiment's external inputs that the store does not have yet.

        Args:
            known: Upstream artifacts that need no lookup, by asset.

        Returns:
            The artifacts, by name of the input.

        Raises:
            StoreError: if a setting names a file, folder or adapter that does not exist.
        """
        return self.published(
            {
                "general_text": self.general_text(),
                "tasks": self.lm_eval_tasks(),
                "warm_start": self.warm_start(**known),
                "reference": self.reference(**known),
            }
        )

    def warm_start(self, **known: ArtifactRef) -> ArtifactRef | Import | None:
        """The adapter that training starts from, in the store or in a folder.

        Args:
            known: Upstream artifacts that need no lookup, by asset.

        Raises:
            StoreError: if the setting names neither an adapter in the store nor an adapter folder.
        """
        if self.experiment.config.training.warm_start == CHAMPION:
            return self.champion_at_start(**known)
        return self.named_warm_start()

    def reference(self, **known: ArtifactRef) -> ArtifactRef | None:
        """The champion that judged answers are compared with; None for the base model."""
        training = self.experiment.config.training
        is_champion = training.objective != "sft" and training.preference.reference == CHAMPION
        return self.champion_at_start(**known) if is_champion else None

    def champion_at_start(self, **known: ArtifactRef) -> ArtifactRef | None:
        """The champion at the start of a training; None if there was none.

        If the current champion was trained from the same inputs, it is the one that this training began with. So a
        promoted adapter is found in the store, and is not trained once more from itself.
        """
        current = self.champions.current()
        if current is None:
            return None
        champion = self.champions.adapter(current)
        manifest = self.store.manifest(champion.kind, champion.name)
        begun = provenance.text(manifest.made_from, CHAMPION_AT_START) if manifest else None
        training = self.experiment.config.training
        fingerprint = ADAPTERS.fingerprint(
            self.experiment.config,
            **{name: self._upstream(name, known).fingerprint for name in ("tokenized_dataset", "cached_base_model")},
            warm_start=begun if training.warm_start == CHAMPION else _identity(self.warm_start(**known)),
            reference=begun if training.preference.reference == CHAMPION else None,
        )
        if fingerprint != champion.fingerprint:
            return champion
        kinds = (ADAPTERS.folder, STACKS.folder)
        return next((ref for kind in kinds if begun and (ref := self.store.find(kind, begun))), None)

    # ---- after training

    def sources_of(self, adapter: ArtifactRef) -> set[str]:
        """Names of the raw data sources that an adapter is trained on; empty if they are not recorded any more."""
        manifest = self.store.manifest(adapter.kind, adapter.name)
        made_from = manifest.made_from if manifest else {}
        if sources := provenance.texts(made_from, SOURCES):
            return set(sources)
        raw = provenance.text(made_from, "dolly_raw")
        read = self.store.manifest(RAW.folder, raw) if raw else None
        source = provenance.text(read.made_from, "source") if read else None
        named = {source_name(source, self.raw.root)} if source else set()
        champions = provenance.texts_by_name(made_from, "champions").values()
        parts = [self.store.find(ADAPTERS.folder, part) for part in champions]
        return named.union(*(self.sources_of(part) for part in parts if part))

    @property
    def champions(self) -> Champions:
        return Champions(self.store, self.experiment.name)

    def opponent(self, adapter: ArtifactRef) -> Record | None:
        """The champion that an adapter is compared with; None for the base model alone.

        For the current champion this is the champion that it was compared with when promoted, so it is not measured
        again.
        """
        current = self.champions.current()
        if current is None or current.adapter != adapter.fingerprint:
            return current
        earlier = [record for record in self.champions.history() if record.adapter == current.against]
        return earlier[-1] if earlier else None

    @property
    def split(self) -> str:
        """The split for evaluation. Points of a sweep are compared on `val`, because gate rows must not select them."""
        return "gate" if self.experiment.sweep is None else "val"

    def evaluation(self, adapter: ArtifactRef | None = None) -> ArtifactRef:
        """The evaluation of `adapter`, by default of the experiment's adapter."""
        name = self.fingerprint(EVALUATIONS, **({"lora_adapter": adapter} if adapter else {}))
        return self.store.resolve(EVALUATIONS.folder, name, made_by="adapter_evaluation")

    def stacked_from(self, base_model: ArtifactRef) -> dict[str, ArtifactRef]:
        """The champions that the experiment's `stack` names, by experiment, in order.

        Raises:
            ArtifactMissing: if an experiment has no champion yet.
            StoreError: if a champion has another base model.
        """
        assert self.experiment.config.stack is not None
        adapters = {}
        for name in self.experiment.config.stack.adapters:
            adapter = Champions(self.store, name).champion()
            if adapter is None:
                raise ArtifactMissing(f"stack.adapters: {NO_CHAMPION.format(name)}")
            manifest = self.store.manifest(adapter.kind, adapter.name)
            theirs = manifest.made_from.get("cached_base_model") if manifest else None
            if theirs != base_model.fingerprint:
                raise StoreError(
                    f"stack.adapters: the champion of {name} has another base model than {self.experiment.name} "
                    f"({str(theirs)[:12]}, not {base_model.fingerprint[:12]}); stack adapters of the same base model "
                    "and revision"
                )
            adapters[name] = adapter
        return adapters

    def champion(self) -> ArtifactRef:
        """The current champion.

        Raises:
            ArtifactMissing: if no adapter was promoted yet.
        """
        adapter = self.champions.champion()
        if adapter is None:
            raise ArtifactMissing(NO_CHAMPION.format(self.experiment.name))
        return adapter


def _identity(item: ArtifactRef | Import | None) -> str | None:
    return item.fingerprint if item else None


def _index(lineage: Lineage, known: Mapping[str, ArtifactRef]) -> str | None:
    return lineage.documents.fingerprint if lineage.documents else None


def _champion_before(lineage: Lineage, known: Mapping[str, ArtifactRef]) -> str | None:
    record = lineage.opponent(lineage._upstream("lora_adapter", known))
    return record.adapter if record else None


def _champions(lineage: Lineage, known: Mapping[str, ArtifactRef]) -> list[str]:
    parts = lineage.stacked_from(lineage._upstream("cached_base_model", known))
    return [ref.fingerprint for ref in parts.values()]


def _rows(lineage: Lineage, known: Mapping[str, ArtifactRef]) -> Any:
    """Identity of the rows that an experiment uses: of a single source without limits, that of its version."""
    selected = lineage.selected_sources(known.get("dolly_raw"))
    versions = {name: ref.fingerprint for name, ref in selected.items()}
    mix, replayed = lineage.mixture(selected), [ref.fingerprint for ref in lineage.replayed(selected)]
    if len(versions) == 1 and not mix and not replayed:
        return next(iter(versions.values()))
    return {"sources": versions, "mix": mix, "replayed": replayed}


LOOKED_UP: dict[str, Callable[[Lineage, Mapping[str, ArtifactRef]], Any]] = {
    "dolly_raw": _rows,
    "retrieval_index": _index,
    "split_salt": lambda lineage, known: lineage.raw.config.split_salt,
    "tokenizer": lambda lineage, known: lineage.tokenizer(lineage._upstream("cached_base_model", known)),
    "warm_start": lambda lineage, known: _identity(lineage.warm_start(**known)),
    "reference": lambda lineage, known: _identity(lineage.reference(**known)),
    "general_text": lambda lineage, known: _identity(lineage.general_text()),
    "tasks": lambda lineage, known: _identity(lineage.lm_eval_tasks()),
    "split": lambda lineage, known: lineage.split,
    "champion": _champion_before,
    "champions": _champions,
}
"""Fingerprint inputs that are not assets of the experiment, by name."""
