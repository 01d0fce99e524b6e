"""Collect all experiments with their latest runs and champions, from configuration and store."""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from finetune_assets.artifacts.champions import Record, parse_record
from finetune_assets.config.comparing import SettingDifference, differences
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.config.loading import base_settings, experiment_files, load_experiment
from finetune_assets.errors import UserError
from finetune_assets.reporting.numbers import with_cost
from finetune_assets.reporting.runs import Run, adapters, evaluations, newest_records, read_run
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory, inventory

RUNS = 3
"""Number of newest runs shown per experiment, in addition to its champion."""
READERS = 8
REPORT_CODE = "2"
"""Increase when the same experiments result in a different page."""
T = TypeVar("T")


@dataclass(frozen=True)
class Reported:
    """One experiment.

    Attributes:
        name: Name of the experiment.
        description: Description from its settings.
        error: Why its settings are invalid; empty if they are valid.
        differences: Settings that differ from `base.yaml` over the defaults.
        runs: Newest runs, newest first, followed by the champion if it is older.
        older: Number of older runs in the store that are not shown.
        champion: Record of the current champion.
    """

    name: str
    description: str = ""
    error: str = ""
    differences: tuple[SettingDifference, ...] = ()
    runs: tuple[Run, ...] = ()
    older: int = 0
    champion: Record | None = None

    @property
    def latest(self) -> Run | None:
        return self.runs[0] if self.runs else None

    def serves(self, run: Run) -> bool:
        return self.champion is not None and self.champion.adapter == run.fingerprint


@dataclass(frozen=True)
class Report:
    """Content of the report.

    Attributes:
        namespace: Namespace of the store.
        experiments: Experiments, newest run first; those without a run are at the end.
        problems: Errors while reading the store and the configuration.
    """

    namespace: str
    experiments: tuple[Reported, ...]
    problems: tuple[str, ...] = ()

    @property
    def trained(self) -> list[Reported]:
        """Experiments with at least one run."""
        return [experiment for experiment in self.experiments if experiment.runs]

    @property
    def fingerprint(self) -> str:
        return fingerprint(code=REPORT_CODE, report=asdict(self))


class Collector:
    """Collects a report from one listing of the store.

    Args:
        store: Store of adapters, evaluations and champions.
        configs: Folder of the configuration files.
    """

    def __init__(self, store: ArtifactStore, configs: Path) -> None:
        self.store, self.configs = store, configs
        self.problems: list[str] = []

    def collect(self) -> Report:
        listing, namespace = inventory(self.store.objects), self.store.namespace
        self.problems += listing.problems
        records = self._records(listing)
        by_experiment: dict[str, list[Artifact]] = defaultdict(list)
        for adapter in adapters(listing, namespace):
            by_experiment[adapter.experiment].append(adapter)
        runs = self._runs(
            listing, [adapter for name in by_experiment for adapter in _shown(by_experiment[name], records.get(name))]
        )
        base = self._read_or_report(lambda: base_settings(self.configs))
        names = sorted({*experiment_files(self.configs), *by_experiment, *records})
        reported = [
            self._reported(name, base, runs[name], len(by_experiment[name]), records.get(name)) for name in names
        ]
        newest_first = sorted(
            reported, key=lambda experiment: experiment.latest.created if experiment.latest else "", reverse=True
        )
        return Report(namespace, tuple(newest_first), tuple(self.problems))

    def _records(self, listing: Inventory) -> dict[str, Record]:
        def read(key: str) -> Record | None:
            return self._read_or_report(lambda: parse_record(listing.records[key], f"{self.store.url}/{key}"))

        records = {name: read(key) for name, key in newest_records(listing, self.store.namespace).items()}
        return {name: record for name, record in records.items() if record}

    def _runs(self, listing: Inventory, artifacts: list[Artifact]) -> dict[str, list[Run]]:
        newest_evaluations = evaluations(listing, self.store.namespace)

        def read(adapter: Artifact) -> Run | None:
            evaluation = newest_evaluations.get(adapter.manifest.fingerprint)
            return self._read_or_report(lambda: read_run(self.store, adapter, evaluation))

        runs: dict[str, list[Run]] = defaultdict(list)
        with ThreadPoolExecutor(READERS) as pool:
            for run in pool.map(read, artifacts):
                if run:
                    runs[run.experiment].append(run)
        return runs

    def _reported(
        self, name: str, base: dict[str, Any] | None, runs: list[Run], count: int, champion: Record | None
    ) -> Reported:
        older = count - len(runs)
        try:
            config = load_experiment(self.configs, name).config
        except ConfigError as e:
            return Reported(
                name, error=str(e).replace(f"{self.configs}/", ""), runs=tuple(runs), older=older, champion=champion
            )
        price = config.hardware.price_per_hour
        changed = tuple(
            difference
            for difference in differences(base or {}, asdict(config))
            if base and difference.setting != "description"
        )
        priced_runs = tuple(replace(run, numbers=with_cost(run.numbers, price)) for run in runs)
        return Reported(name, config.description, "", changed, priced_runs, older, champion)

    def _read_or_report(self, read: Callable[[], T]) -> T | None:
        """Return the result of `read`; on an error record a problem and return None, so that the rest is still read."""
        try:
            return read()
        except (UserError, OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as e:
            self.problems.append(str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}")
            return None


def collect(store: ArtifactStore, configs: Path) -> Report:
    """Collect every experiment with a file or an adapter; read errors are added to `problems`."""
    return Collector(store, configs).collect()


def _shown(newest_first: list[Artifact], champion: Record | None) -> list[Artifact]:
    older = newest_first[RUNS:]
    return newest_first[:RUNS] + [
        adapter for adapter in older if champion and adapter.manifest.fingerprint == champion.adapter
    ]
