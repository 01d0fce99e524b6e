"""The registry of artifact kinds: one entry for each folder of the store.

An entry is the only place that defines a kind's folder, asset, code version, identity and retention. Assets, lineage,
the IO manager, automation, garbage collection and reports read them from here. To add an asset, add its kind here and
its file to `assets/`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune_assets.config.documents_schema import DocumentsConfig
from finetune_assets.config.fingerprint import fingerprint, identity
from finetune_assets.config.raw_data_schema import RawDataConfig
from finetune_assets.config.schema import ExperimentConfig, Model
from finetune_assets.config.step_selection import selection_identity
from finetune_assets.data.learning import Learning
from finetune_assets.store.artifacts import CHECKPOINTS as CHECKPOINTS_FOLDER
from finetune_assets.store.artifacts import SHARED
from finetune_assets.store.gc import Retention

Inputs = Mapping[str, Any]
Parts = Callable[[Any, Inputs], dict[str, Any]]
BY_REFERENCE = Retention()


@dataclass(frozen=True)
class ArtifactKind:
    """A kind of artifact.

    Attributes:
        folder: Folder in the store.
        asset: Asset that publishes the kind; None if it is published otherwise.
        code_version: Version of the code that computes the artifact, for Dagster and for the fingerprint. Increment it
            when a change of that code changes the bytes.
        inputs: Names of all inputs except settings that determine the bytes: assets, and values that `Lineage` looks
            up.
        parts: Computes the parts of the fingerprint from settings and inputs.
        retention: Retention policy for garbage collection.
        earlier: Earlier code versions whose artifacts may have the same content, each with its `parts`. An asset that
            finds it so keeps the earlier artifact's identity, and nothing downstream is computed again.
    """

    folder: str
    asset: str | None = None
    code_version: str = ""
    inputs: tuple[str, ...] = ()
    parts: Parts | None = None
    retention: Retention = BY_REFERENCE
    earlier: tuple[tuple[str, Parts], ...] = ()

    def earlier_fingerprints(self, config: Any, **inputs: Any) -> list[str]:
        """Fingerprints of the same inputs under the earlier code versions."""
        versions = (replace(self, code_version=code, parts=parts) for code, parts in self.earlier)
        return [version.fingerprint(config, **inputs) for version in versions]

    def fingerprint(self, config: ExperimentConfig | RawDataConfig | DocumentsConfig | None, **inputs: Any) -> str:
        """Fingerprint of an artifact of this kind, 64 hex digits.

        Args:
            config: The settings: an experiment's, the raw data's for `RAW`, or a document set's for `INDEXES`.
            inputs: A value for each name in `self.inputs`: the fingerprint of an asset's artifact, or plain data.

        Raises:
            TypeError: if an input is missing or unknown.
        """
        if self.parts is None or inputs.keys() != {*self.inputs}:
            raise TypeError(f"{self.folder}: expected the inputs {[*self.inputs]}, got {[*inputs]}")
        return fingerprint(code=self.code_version, **self.parts(config, inputs))


def _raw(config: RawDataConfig, inputs: Inputs) -> dict[str, Any]:
    return {"columns": identity(config.columns), "content": inputs["content"]}


def _index(config: DocumentsConfig, inputs: Inputs) -> dict[str, Any]:
    return {"documents": identity(config), "content": inputs["content"], "model": inputs["model"]}


def _base_model(config: None, inputs: Inputs) -> dict[str, Any]:
    return {"repo": inputs["repo"], "revision": inputs["revision"]}


def _tokenized(config: ExperimentConfig, inputs: Inputs) -> dict[str, Any]:
    return {
        "data": identity(config.data),
        "split_salt": inputs["split_salt"],
        "raw": inputs["dolly_raw"],
        "tokenizer": inputs["tokenizer"],
        **_retrieval(config, inputs),
        **Learning.of(config.training).identity,
    }


def _retrieval(config: ExperimentConfig, inputs: Inputs) -> dict[str, Any]:
    """The index that an experiment retrieves from, if it does."""
    return {"retrieval_index": inputs["retrieval_index"]} if config.data.retrieval else {}


def _tokenized_4(config: ExperimentConfig, inputs: Inputs) -> dict[str, Any]:
    return {**_tokenized(config, inputs), "data": identity(config.data, added=False)}


def _adapter(config: ExperimentConfig, inputs: Inputs) -> dict[str, Any]:
    return {
        "model": _without_source(config.model),
        "training": {**identity(config.training), **selection_identity(config), "warm_start": inputs["warm_start"]},
        "lora": identity(config.lora),
        "tokenized": inputs["tokenized_dataset"],
        "base_model": inputs["cached_base_model"],
        **({"reference": inputs["reference"]} if inputs["reference"] else {}),
    }


def _reference(config: ExperimentConfig, inputs: Inputs) -> dict[str, Any]:
    return {
        "model": _without_source(config.model),
        "objective": config.training.objective,
        "precision": config.training.precision,
        "tokenized": inputs["tokenized_dataset"],
        "base_model": inputs["cached_base_model"],
        "reference": inputs["reference"],
    }


def _plan(config: ExperimentConfig, inputs: Inputs) -> dict[str, Any]:
    return {"adapter": inputs["lora_adapter"]}


def _evaluation(config: ExperimentConfig, inputs: Inputs) -> dict[str, Any]:
    settings = identity(config.evaluation)
    del settings["general_text"]  # identified by content, as is a folder of tasks
    if settings["lm_eval"]:
        settings["lm_eval"]["folder"] = inputs["tasks"]
    return {
        "evaluation": settings,
        "adapter": inputs["lora_adapter"],
        "champion": inputs["champion"],
        "general_text": inputs["general_text"],
        "split": inputs["split"],
        **_retrieval(config, inputs),
    }


def _merged(config: ExperimentConfig, inputs: Inputs) -> dict[str, Any]:
    return {"merge": identity(config.merge), "adapter": inputs["champion_adapter"]}


def _servable(config: None, inputs: Inputs) -> dict[str, Any]:
    return {name: inputs[name] for name in ("adapter", "base_name", "rank")}


def _stack(config: ExperimentConfig, inputs: Inputs) -> dict[str, Any]:
    return {
        "stack": identity(config.stack),
        "seed": config.training.seed,
        "model": _without_source(config.model),
        "adapters": inputs["champions"],
        "base_model": inputs["cached_base_model"],
    }


def _without_source(model: Model) -> dict[str, Any]:
    """The model's settings without name and revision: the base model is identified by content."""
    settings: dict[str, Any] = identity(model)
    del settings["base_model"], settings["revision"]
    return settings


RAW = ArtifactKind(
    "raw",
    "dolly_raw",
    "5",
    ("content",),
    _raw,
    Retention(newest="keep_raw"),
    earlier=(("4", _raw), ("3", _raw)),
)
"""`content` identifies every byte of the source: file hashes in reading order, or a Hub commit."""
INDEXES = ArtifactKind(
    "indexes", "retrieval_index", "1", ("content", "model"), _index, Retention(newest="keep_indexes")
)
"""`content` identifies every document: names and hashes of files, a Hub commit, or the version of the raw data whose
contexts are the documents. `model` identifies the model of a dense index, or is None."""
BASE_MODELS = ArtifactKind(SHARED, "cached_base_model", "1", ("repo", "revision"), _base_model)
"""Shared by all namespaces, and named by repository and commit instead of a fingerprint."""
TOKENIZED = ArtifactKind(
    "tokenized",
    "tokenized_dataset",
    "5",
    ("dolly_raw", "tokenizer", "split_salt", "retrieval_index"),
    _tokenized,
    earlier=(("4", _tokenized_4),),
)
"""`tokenizer` maps each tokenizer file of the base model to its sha256; `retrieval_index` is the fingerprint of the
index of the experiment's document set, or None."""
ADAPTERS = ArtifactKind(
    "adapters",
    "lora_adapter",
    "4",
    ("tokenized_dataset", "cached_base_model", "warm_start", "reference"),
    _adapter,
    Retention(newest="keep_adapters", of_each_experiment=True),
)
"""`warm_start` is the fingerprint of the adapter that training starts from, and `reference` that of the champion that
judged answers are compared with; each may be None."""
REFERENCES = ArtifactKind(
    "references",
    code_version="1",
    inputs=("tokenized_dataset", "cached_base_model", "reference"),
    parts=_reference,
    retention=Retention(with_kept=TOKENIZED.folder),
)
"""Log-probabilities of a dataset's judged answers under a reference model, which all trainings on it share."""
PLANS = ArtifactKind("plans", "training_plan", "1", ("lora_adapter",), _plan, Retention(with_kept=ADAPTERS.folder))
"""`lora_adapter` is the fingerprint that the planned adapter will have."""
EVALUATIONS = ArtifactKind(
    "evaluations",
    "adapter_evaluation",
    "3",
    ("lora_adapter", "champion", "general_text", "tasks", "split", "retrieval_index"),
    _evaluation,
    Retention(with_kept=ADAPTERS.folder),
)
"""`champion`, `general_text`, `tasks` and `retrieval_index` are fingerprints, or None; `split` names the evaluated
split."""
CHAMPIONS = ArtifactKind("champions", "champion_adapter", "1", retention=Retention(collected=False))
"""Numbered records that name adapters; not artifacts themselves."""
MERGED = ArtifactKind("merged", "merged_model", "2", ("champion_adapter",), _merged)
SERVABLE = ArtifactKind(
    "servable",
    code_version="1",
    inputs=("adapter", "base_name", "rank"),
    parts=_servable,
    retention=Retention(with_kept=ADAPTERS.folder),
)
"""Adapters in the form that servers load: `adapter` is the fingerprint of the trained adapter."""
SERVED = ArtifactKind("served", "served_adapter", "1", retention=Retention(collected=False))
"""Numbered records that name what servers answer with; not artifacts themselves."""
OF_CHAMPION = (CHAMPIONS, SERVED)
"""Kinds whose artifact is the champion itself."""
STACKS = ArtifactKind("stacks", "stacked_adapter", "2", ("champions", "cached_base_model"), _stack)
"""`champions` are fingerprints, in the order of `stack.adapters`."""
REPORTS = ArtifactKind("reports", "experiment_report", "1", retention=Retention(newest="keep_reports"))
IMPORTS = ArtifactKind("imports")
"""Imports from a file or folder: adapters for a warm start, texts and tasks for evaluations."""
CHECKPOINTS = ArtifactKind(CHECKPOINTS_FOLDER)

KINDS = (
    RAW,
    INDEXES,
    BASE_MODELS,
    TOKENIZED,
    PLANS,
    ADAPTERS,
    REFERENCES,
    EVALUATIONS,
    CHAMPIONS,
    MERGED,
    SERVABLE,
    SERVED,
    STACKS,
    REPORTS,
    IMPORTS,
    CHECKPOINTS,
)
KIND_OF = {kind.asset: kind for kind in KINDS if kind.asset}
"""Kinds by the asset that publishes them."""
RETENTION = {kind.folder: kind.retention for kind in KINDS}
