"""Every experiment with its latest runs and its champion, from configuration and store."""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from finetune_assets.artifacts.champions import Record, parse_record
from finetune_assets.config.comparing import Difference, differences
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.config.loading import base_settings, experiment_files, load_experiment
from finetune_assets.errors import UserError
from finetune_assets.reporting.numbers import with_cost
from finetune_assets.reporting.runs import Run, adapters, evaluations, newest_records, read_run
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.gc import Artifact, Inventory, inventory

RUNS = 3
"""Newest runs of an experiment that are shown, besides its champion."""
READERS = 8
REPORT_CODE = "1"
"""Raise it when the same experiments give another page."""
T = TypeVar("T")


@dataclass(frozen=True)
class Reported:
    """One experiment.

    Attributes:
        name: Its name.
        description: What it is for.
        error: Why its settings cannot be read; empty where they can.
        differences: How its settings differ from `base.yaml` over the defaults.
        runs: Its newest runs, newest first; at the end its champion, where that is older.
        older: How many more the store has.
        champion: The record of the adapter that serves.
    """

    name: str
    description: str = ""
    error: str = ""
    differences: tuple[Difference, ...] = ()
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
    """Everything that is reported.

    Attributes:
        namespace: Whose.
        experiments: Those with the newest runs first, those without any at the end.
        problems: What could not be read.
    """

    namespace: str
    experiments: tuple[Reported, ...]
    problems: tuple[str, ...] = ()

    @property
    def trained(self) -> list[Reported]:
        """Experiments with a run."""
        return [one for one in self.experiments if one.runs]

    @property
    def fingerprint(self) -> str:
        return fingerprint(code=REPORT_CODE, report=asdict(self))


class Collector:
    """Reads a store once.

    Args:
        store: Where adapters, evaluations and champions lie.
        configs: Folder of the configuration.
    """

    def __init__(self, store: ArtifactStore, configs: Path) -> None:
        self.store, self.configs = store, configs
        self.problems: list[str] = []

    def collect(self) -> Report:
        found, namespace = inventory(self.store.objects), self.store.namespace
        records = self._records(found)
        made: dict[str, list[Artifact]] = defaultdict(list)
        for adapter in adapters(found, namespace):
            made[adapter.experiment].append(adapter)
        runs = self._runs(found, [one for name in made for one in _shown(made[name], records.get(name))])
        base = self._tried(lambda: base_settings(self.configs))
        names = sorted({*experiment_files(self.configs), *made, *records})
        reported = [self._reported(name, base, runs[name], len(made[name]), records.get(name)) for name in names]
        newest_first = sorted(reported, key=lambda one: one.latest.created if one.latest else "", reverse=True)
        return Report(namespace, tuple(newest_first), tuple(self.problems))

    def _records(self, found: Inventory) -> dict[str, Record]:
        def read(key: str) -> Record | None:
            return self._tried(lambda: parse_record(found.records[key], f"{self.store.url}/{key}"))

        records = {name: read(key) for name, key in newest_records(found, self.store.namespace).items()}
        return {name: record for name, record in records.items() if record}

    def _runs(self, found: Inventory, wanted: list[Artifact]) -> dict[str, list[Run]]:
        measured = evaluations(found, self.store.namespace)

        def read(one: Artifact) -> Run | None:
            return self._tried(lambda: read_run(self.store, one, measured.get(one.manifest.fingerprint)))

        runs: dict[str, list[Run]] = defaultdict(list)
        with ThreadPoolExecutor(READERS) as pool:
            for run in pool.map(read, wanted):
                if run:
                    runs[run.experiment].append(run)
        return runs

    def _reported(
        self, name: str, base: dict[str, Any] | None, runs: list[Run], made: int, champion: Record | None
    ) -> Reported:
        older = made - len(runs)
        try:
            config = load_experiment(self.configs, name).config
        except ConfigError as e:
            return Reported(
                name, error=str(e).replace(f"{self.configs}/", ""), runs=tuple(runs), older=older, champion=champion
            )
        price = config.hardware.price_per_hour
        told = tuple(one for one in differences(base or {}, asdict(config)) if base and one.setting != "description")
        costs = tuple(replace(run, numbers=with_cost(run.numbers, price)) for run in runs)
        return Reported(name, config.description, "", told, costs, older, champion)

    def _tried(self, read: Callable[[], T]) -> T | None:
        """What one part says, or None and a problem more: no part takes the others down."""
        try:
            return read()
        except (UserError, OSError, ValueError, KeyError, TypeError) as e:
            self.problems.append(str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}")
            return None


def collect(store: ArtifactStore, configs: Path) -> Report:
    """Every experiment that has a file or an adapter; what cannot be read is told among the problems."""
    return Collector(store, configs).collect()


def _shown(made: list[Artifact], champion: Record | None) -> list[Artifact]:
    older = made[RUNS:]
    return made[:RUNS] + [one for one in older if champion and one.manifest.fingerprint == champion.adapter]
