"""Compare two runs: settings, inputs, versions and measurements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_assets.artifacts.evaluations import newest_evaluations
from finetune_assets.artifacts.layout import CONFIG, PROVENANCE
from finetune_assets.config.comparing import SettingDifference, differences
from finetune_assets.config.loading import read_settings
from finetune_assets.reporting.runs import Run, read, read_object, read_run
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory

INPUTS = ("base_model", "revision", "cached_base_model", "dolly_raw", "tokenized_dataset", "warm_start", "champions")
"""Inputs of an adapter, as keys of its manifest's `made_from`."""


@dataclass(frozen=True)
class Pair:
    """A measurement of both runs; None for a run that was not measured."""

    name: str
    first: float | None
    second: float | None

    @property
    def difference(self) -> float | None:
        return None if self.first is None or self.second is None else self.second - self.first


@dataclass(frozen=True)
class RunComparison:
    """How two runs differ.

    Attributes:
        first: First run.
        second: Second run.
        settings: Settings that differ.
        inputs: Base model and data that differ, by name or fingerprint.
        versions: Package versions and hardware that differ.
        numbers: All measurements of either run.
    """

    first: Run
    second: Run
    settings: list[SettingDifference]
    inputs: list[SettingDifference]
    versions: list[SettingDifference]
    numbers: list[Pair]

    def to_dict(self) -> dict[str, Any]:
        def both(changes: list[SettingDifference]) -> dict[str, list[str]]:
            return {change.setting: [change.before, change.after] for change in changes}

        return {
            "runs": [
                {"experiment": run.experiment, "fingerprint": run.fingerprint, "created": run.created}
                for run in (self.first, self.second)
            ],
            "settings": both(self.settings),
            "inputs": both(self.inputs),
            "versions": both(self.versions),
            "numbers": {
                pair.name: {"first": pair.first, "second": pair.second, "difference": pair.difference}
                for pair in self.numbers
            },
        }


def compare(store: ArtifactStore, inventory: Inventory, first: Artifact, second: Artifact) -> RunComparison:
    """Compare two adapters of a store, using the newest evaluation of each."""
    evaluations = newest_evaluations(inventory, store.namespace)
    run, other_run = (
        read_run(store, adapter, evaluations.get(adapter.manifest.fingerprint)) for adapter in (first, second)
    )
    settings = [read_settings(read(store, adapter, CONFIG)) for adapter in (first, second)]
    versions = [_versions(read_object(store, adapter, PROVENANCE)) for adapter in (first, second)]
    names = dict.fromkeys([*run.numbers, *other_run.numbers])
    return RunComparison(
        run,
        other_run,
        differences(*settings),
        differences(_inputs(run.made_from), _inputs(other_run.made_from)),
        differences(*versions),
        [Pair(name, run.numbers.get(name), other_run.numbers.get(name)) for name in names],
    )


def _inputs(made_from: Mapping[str, Any]) -> dict[str, Any]:
    return {name: made_from.get(name) for name in INPUTS if name in made_from}


def _versions(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {**provenance["versions"], "hardware": provenance["hardware"]}
