"""Collect all experiments with their latest runs and champions, from configuration and store."""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from finetune_assets.artifacts.champions import Record, parse_record
from finetune_assets.artifacts.evaluations import newest_evaluations
from finetune_assets.artifacts.kinds import CHAMPIONS, SERVED
from finetune_assets.config.comparing import SettingDifference, differences
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.config.loading import base_settings, experiment_files, load_experiment
from finetune_assets.config.retrieval_validation import gate_mode
from finetune_assets.errors import UserError
from finetune_assets.reporting.histories import History, keys_by_experiment, read_history
from finetune_assets.reporting.numbers import with_cost
from finetune_assets.reporting.runs import Run, adapters, read_run
from finetune_assets.serving.state import Served, parse_served
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory, inventory
from finetune_assets.store.json_object import MOST_BYTES

RUNS = 3
"""Number of newest runs shown per experiment, in addition to its champion."""
READERS = 8
REPORT_CODE = "3"
"""Increase when the same experiments result in different pages."""
T = TypeVar("T")


@dataclass(frozen=True)
class Reported:
    """One experiment.

    Attributes:
        name: Name of the experiment.
        description: Description from its settings.
        error: Why its settings are invalid; empty if they are valid.
        differences: Settings that differ from `base.yaml` over the defaults.
        gate_mode: Retrieval mode that the gate compares; empty without retrieval.
        runs: Newest runs, newest first, followed by the champion if it is older.
        older: Number of older runs in the store that are not shown.
        champions: History of the champions.
        served: History of what the servers answered with.
    """

    name: str
    description: str = ""
    error: str = ""
    differences: tuple[SettingDifference, ...] = ()
    gate_mode: str = ""
    runs: tuple[Run, ...] = ()
    older: int = 0
    champions: History[Record] = field(default_factory=History)
    served: History[Served] = field(default_factory=History)

    @property
    def latest(self) -> Run | None:
        return self.runs[0] if self.runs else None

    @property
    def evaluated(self) -> Run | None:
        """The newest run that has been evaluated."""
        return next((run for run in self.runs if run.evaluation), None)

    @property
    def champion(self) -> Record | None:
        return self.champions.current

    def is_champion(self, run: Run) -> bool:
        return self.champion is not None and self.champion.adapter == run.fingerprint

    def is_served(self, run: Run) -> bool:
        return self.served.current is not None and self.served.current.adapter == run.fingerprint

    def promotion(self, run: Run) -> Record | None:
        """The newest record that made the run the champion, if it is shown."""
        return next((record for record in self.champions.records if record.adapter == run.fingerprint), None)

    def is_unpromoted(self, run: Run) -> bool:
        """Whether the run was evaluated and never became the champion."""
        return bool(run.evaluation) and not self.champions.older and self.promotion(run) is None


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
        store: Store of adapters, evaluations and records.
        configs: Folder of the configuration files.
    """

    def __init__(self, store: ArtifactStore, configs: Path) -> None:
        self.store, self.configs = store, configs
        self.problems: list[str] = []

    def collect(self) -> Report:
        listing, namespace = inventory(self.store.objects), self.store.namespace
        self.problems += listing.problems
        champions = self._champions(listing)
        served = self._served()
        by_experiment: dict[str, list[Artifact]] = defaultdict(list)
        for adapter in adapters(listing, namespace):
            by_experiment[adapter.experiment].append(adapter)
        shown = {name: _shown(found, champions.get(name)) for name, found in by_experiment.items()}
        runs = self._runs(listing, [adapter for found in shown.values() for adapter in found])
        base = self._read_or_report(lambda: base_settings(self.configs))
        names = sorted({*experiment_files(self.configs), *by_experiment, *champions, *served})
        reported = [
            Reported(
                name,
                runs=tuple(runs[name]),
                older=len(by_experiment[name]) - len(runs[name]),
                champions=champions.get(name, History()),
                served=served.get(name, History()),
            )
            for name in names
        ]
        newest_first = sorted(
            (self._with_settings(experiment, base) for experiment in reported),
            key=lambda experiment: experiment.latest.created if experiment.latest else "",
            reverse=True,
        )
        return Report(namespace, tuple(newest_first), tuple(sorted(self.problems)))

    def _champions(self, listing: Inventory) -> dict[str, History[Record]]:
        def read(key: str) -> Record | None:
            return self._read_or_report(lambda: parse_record(listing.records[key], f"{self.store.url}/{key}"))

        keys = keys_by_experiment(listing.records, f"{self.store.namespace}/{CHAMPIONS.folder}/")
        return {name: read_history(found, read) for name, found in keys.items()}

    def _served(self) -> dict[str, History[Served]]:
        """What the servers answered with, without the rows that servers are asked."""

        def read(key: str) -> Served | None:
            content = self._read_or_report(lambda: self.store.objects.get(key, MOST_BYTES))
            if content is None:
                return None
            record = self._read_or_report(lambda: parse_served(content, f"{self.store.url}/{key}"))
            return replace(record, probe={}) if record else None

        prefix = f"{self.store.namespace}/{SERVED.folder}/"
        keys = keys_by_experiment((stored.key for stored in self.store.objects.listing(prefix)), prefix)
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(keys, pool.map(lambda found: read_history(found, read), keys.values()), strict=True))

    def _runs(self, listing: Inventory, artifacts: list[Artifact]) -> dict[str, list[Run]]:
        evaluations = newest_evaluations(listing, self.store.namespace)

        def read(adapter: Artifact) -> Run | None:
            evaluation = evaluations.get(adapter.manifest.fingerprint)
            return self._read_or_report(lambda: read_run(self.store, adapter, evaluation))

        runs: dict[str, list[Run]] = defaultdict(list)
        with ThreadPoolExecutor(READERS) as pool:
            for run in pool.map(read, artifacts):
                if run:
                    runs[run.experiment].append(run)
        return runs

    def _with_settings(self, experiment: Reported, base: dict[str, Any] | None) -> Reported:
        try:
            config = load_experiment(self.configs, experiment.name).config
        except ConfigError as e:
            return replace(experiment, error=str(e).replace(f"{self.configs}/", ""))
        price = config.hardware.price_per_hour
        changed = tuple(
            difference
            for difference in differences(base or {}, asdict(config))
            if base and difference.setting != "description"
        )
        return replace(
            experiment,
            description=config.description,
            differences=changed,
            gate_mode=gate_mode(config) or "",
            runs=tuple(replace(run, numbers=with_cost(run.numbers, price)) for run in experiment.runs),
        )

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


def _shown(newest_first: list[Artifact], champions: History[Record] | None) -> list[Artifact]:
    older, champion = newest_first[RUNS:], champions.current if champions else None
    return newest_first[:RUNS] + [
        adapter for adapter in older if champion and adapter.manifest.fingerprint == champion.adapter
    ]
