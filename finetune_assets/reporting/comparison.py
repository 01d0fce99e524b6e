"""Two runs, setting by setting and number by number."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_assets.artifacts.layout import CONFIG, PROVENANCE
from finetune_assets.config.comparing import Difference, differences
from finetune_assets.config.loading import read_settings
from finetune_assets.reporting.runs import Run, evaluations, read, read_run
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory

INPUTS = ("base_model", "revision", "cached_base_model", "dolly_raw", "tokenized_dataset", "warm_start", "champions")
"""What an adapter's origin says of its inputs."""


@dataclass(frozen=True)
class Pair:
    """A number of both runs; None where one was not measured."""

    name: str
    first: float | None
    second: float | None

    @property
    def difference(self) -> float | None:
        return None if self.first is None or self.second is None else self.second - self.first


@dataclass(frozen=True)
class Comparison:
    """How two runs differ.

    Attributes:
        first: The one.
        second: The other.
        settings: Settings that differ.
        inputs: Base model and data that differ, by name or fingerprint.
        versions: Versions of packages, and hardware, that differ.
        numbers: All that was measured of either.
    """

    first: Run
    second: Run
    settings: list[Difference]
    inputs: list[Difference]
    versions: list[Difference]
    numbers: list[Pair]

    def to_dict(self) -> dict[str, Any]:
        def both(found: list[Difference]) -> dict[str, list[str]]:
            return {one.setting: [one.before, one.after] for one in found}

        return {
            "runs": [
                {"experiment": run.experiment, "fingerprint": run.fingerprint, "created": run.created}
                for run in (self.first, self.second)
            ],
            "settings": both(self.settings),
            "inputs": both(self.inputs),
            "versions": both(self.versions),
            "numbers": {
                one.name: {"first": one.first, "second": one.second, "difference": one.difference}
                for one in self.numbers
            },
        }


def compare(store: ArtifactStore, found: Inventory, first: Artifact, second: Artifact) -> Comparison:
    """Compare two adapters of a store, as they were trained and as they were measured last."""
    measured = evaluations(found, store.namespace)
    one, other = (read_run(store, adapter, measured.get(adapter.manifest.fingerprint)) for adapter in (first, second))
    settings = [read_settings(read(store, adapter, CONFIG)) for adapter in (first, second)]
    versions = [_versions(json.loads(read(store, adapter, PROVENANCE))) for adapter in (first, second)]
    names = dict.fromkeys([*one.numbers, *other.numbers])
    return Comparison(
        one,
        other,
        differences(*settings),
        differences(_inputs(one.made_from), _inputs(other.made_from)),
        differences(*versions),
        [Pair(name, one.numbers.get(name), other.numbers.get(name)) for name in names],
    )


def _inputs(made_from: Mapping[str, Any]) -> dict[str, Any]:
    return {name: made_from.get(name) for name in INPUTS if name in made_from}


def _versions(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {**provenance["versions"], "hardware": provenance["hardware"]}
