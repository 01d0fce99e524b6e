"""Hashes of the settings that each asset of an experiment reads."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune_assets.artifacts.champions import Champions
from finetune_assets.artifacts.kinds import ADAPTERS, EVALUATIONS, KIND_OF, MERGED, STACKS, TOKENIZED, ArtifactKind
from finetune_assets.artifacts.raw_lineage import name_of_single
from finetune_assets.config.data_schema import Retrieval
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.fingerprint import fingerprint, identity
from finetune_assets.config.loading import Experiment, experiment_files, load_experiment, load_raw_data_config
from finetune_assets.config.raw_data_schema import PACKAGED_ROWS
from finetune_assets.resources import deployment

logger = logging.getLogger(__name__)


def _identity(kind: ArtifactKind, experiment: Experiment, **inputs: Any) -> str:
    """Identity of an artifact as determined by settings alone, with constant upstream artifacts."""
    config = experiment.config
    given = {
        "warm_start": config.training.warm_start,
        "general_text": config.evaluation.general_text,
        "tasks": None,
        "champion": None,
        "reference": None,
        "split": "gate",
        **inputs,
    }
    return kind.fingerprint(config, **{name: given.get(name, "") for name in kind.inputs})


def _base_model(experiment: Experiment, split_salt: str) -> str:
    model = experiment.config.model
    return fingerprint(base_model=model.base_model, revision=model.revision)


def _tokenized(experiment: Experiment, split_salt: str) -> str:
    # A threshold does not change the bytes, but may change whether a check passes
    sources = experiment.config.data.sources
    return fingerprint(
        identity=_identity(TOKENIZED, experiment, split_salt=split_salt, tokenizer={}),
        allowed=experiment.config.data.max_refused_share,
        **({"sources": sources} if sources else {}),
    )


def _adapter(experiment: Experiment, split_salt: str) -> str | None:
    return None if experiment.config.stack else _identity(ADAPTERS, experiment)


def _plan(experiment: Experiment, split_salt: str) -> str | None:
    """Hash of all settings that decide whether the training fits, even those that do not change the adapter."""
    config = experiment.config
    adapter, training, hardware, serving = (
        _adapter(experiment, split_salt),
        config.training,
        config.hardware,
        config.serving,
    )
    return adapter and fingerprint(
        adapter=adapter,
        computed=[training.gradient_checkpointing, training.sharding, training.processes_per_node],
        hardware=[hardware.gpu, hardware.memory_gib, hardware.count],
        **({"serving": serving.max_rank} if serving else {}),
    )


def _evaluation(experiment: Experiment, split_salt: str) -> str | None:
    return None if experiment.config.stack else _identity(EVALUATIONS, experiment)


def _champion(experiment: Experiment, split_salt: str) -> str | None:
    if experiment.config.stack or experiment.sweep:
        return None
    return fingerprint(gate=identity(experiment.config.gate))


def _stack(experiment: Experiment, split_salt: str) -> str | None:
    """Hash of the stack settings and the current champions, which are read from the store like settings."""
    if experiment.config.stack is None:
        return None
    store = deployment.store()
    records = [Champions(store, name).current() for name in experiment.config.stack.adapters]
    if None in records:
        return None
    champions = [record.adapter for record in records if record]
    return fingerprint(stack=_identity(STACKS, experiment, champions=champions), gate=identity(experiment.config.gate))


def _merge(experiment: Experiment, split_salt: str) -> str | None:
    return _identity(MERGED, experiment) if experiment.config.merge else None


def _served(experiment: Experiment, split_salt: str) -> str | None:
    return fingerprint(serving=asdict(experiment.config.serving)) if experiment.config.serving else None


SETTINGS: dict[str, Callable[[Experiment, str], str | None]] = {
    "cached_base_model": _base_model,
    "tokenized_dataset": _tokenized,
    "training_plan": _plan,
    "lora_adapter": _adapter,
    "adapter_evaluation": _evaluation,
    "champion_adapter": _champion,
    "merged_model": _merge,
    "served_adapter": _served,
    "stacked_adapter": _stack,
}
"""Functions that hash the settings of an asset, for assets that need more than the identity of their kind. The hash is
None if the experiment does not configure the asset."""


def settings_hashes(asset: str) -> dict[str, str]:
    """Hash of an asset's settings by subscribed experiment.

    Experiments that cannot be loaded are left out, and those that use a source that is not configured.
    """
    configs = deployment.configs()
    salt, sources = _choice_of_rows(configs, deployment.raw_data(), deployment.file_stamp(configs / "raw_data.yaml"))
    base = deployment.file_stamp(configs / "base.yaml")
    hashes = {}
    for name in experiment_files(configs):  # experiments of a sweep are never subscribed
        experiment = _loaded(configs, name, base, deployment.file_stamp(configs / "experiments" / f"{name}.yaml"))
        if not experiment or not experiment.config.subscribed:
            continue
        if unknown := sorted({*_sources(experiment)} - sources - {*PACKAGED_ROWS}):
            _warn(name, tuple(unknown), tuple(sorted(sources)))
        if not sources.issuperset(_sources(experiment)):
            continue
        if settings := _settings(asset, experiment, salt):
            hashes[name] = settings
    return hashes


def retrieval_of_experiments() -> dict[str, Retrieval]:
    """Settings of the subscribed experiments that retrieve."""
    configs = deployment.configs()
    base = deployment.file_stamp(configs / "base.yaml")
    retrieval = {}
    for name in experiment_files(configs):
        experiment = _loaded(configs, name, base, deployment.file_stamp(configs / "experiments" / f"{name}.yaml"))
        if experiment and experiment.config.subscribed and experiment.config.data.retrieval:
            retrieval[name] = experiment.config.data.retrieval
    return retrieval


def _settings(asset: str, experiment: Experiment, split_salt: str) -> str | None:
    read = SETTINGS.get(asset)
    return read(experiment, split_salt) if read else _identity(KIND_OF[asset], experiment, split_salt=split_salt)


@lru_cache
def _choice_of_rows(configs: Path, source: str | None, stamp: tuple[int, int]) -> tuple[str, frozenset[str]]:
    """Raw data settings that choose rows: the split salt, hashed with weights and limits of sources if there are any.

    Cached for a file stamp, because each evaluation needs it many times.

    Returns:
        The salt or hash, and the names of the sources.
    """
    config = load_raw_data_config(configs, source)
    names = frozenset(config.sources or [name_of_single(config)])
    mixture = {name: [part.weight, part.max_rows] for name, part in config.sources.items()}
    if not any(value for values in mixture.values() for value in values):
        return config.split_salt, names
    return fingerprint(salt=config.split_salt, mixture=mixture), names


@lru_cache
def _warn(experiment: str, unknown: tuple[str, ...], sources: tuple[str, ...]) -> None:
    """Log once that an experiment is not trained because its sources are not configured."""
    logger.warning(
        "experiment %s is not trained automatically: data.sources names %s; sources in raw_data.yaml: %s",
        experiment,
        ", ".join(unknown),
        ", ".join(sources),
    )


def _sources(experiment: Experiment) -> list[str]:
    return experiment.config.data.sources or []


@lru_cache(maxsize=10_000)
def _loaded(configs: Path, name: str, *stamps: tuple[int, int]) -> Experiment | None:
    """An experiment at these file stamps; None if it cannot be loaded."""
    try:
        return load_experiment(configs, name)
    except ConfigError as e:
        logger.error("experiment %s is not trained automatically: %s", name, e)
        return None
