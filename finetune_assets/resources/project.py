"""Dagster resource of all assets: the configuration of the run, and the lineage derived from it."""

from collections.abc import Mapping
from contextlib import ExitStack

import dagster as dg
from pydantic import Field, PrivateAttr

from finetune_assets.artifacts.lineage import Lineage, RawLineage
from finetune_assets.config.loading import Experiment, load_experiment, load_raw_data_config
from finetune_assets.config.raw_data_schema import RawDataConfig
from finetune_assets.progress import mirror
from finetune_assets.resources import deployment, run_liveness
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.locks import Lock

DATA_VERSION_TAG = "dagster/data_version"
OVERRIDES_TAG = "finetune/overrides"
"""Tag of a materialization with per-run overrides: their number. Automation ignores such materializations."""
GOOD_TAG = "finetune/good"
"""Tag of a `dolly_raw` materialization that passed its blocking checks. Later versions are compared with it."""
AUTOMATIC_TAG = "finetune/auto_materialize"
"""Tag of a run that automation started."""


def newest_raw_tags(instance: dg.DagsterInstance) -> Mapping[str, str]:
    """Tags of the newest materialization of `dolly_raw`; empty if it was never materialized."""
    last = instance.get_latest_materialization_event(dg.AssetKey("dolly_raw"))
    return (last.asset_materialization.tags if last and last.asset_materialization else None) or {}


class Project(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Configuration and store of one run, identical for all its assets."""

    overrides: list[str] = Field(
        default=[], description="Settings overrides for this run only, such as training.learning_rate=1e-4."
    )
    force: bool = Field(default=False, description="Recompute artifacts even if the store has them.")

    _raw_version: str | None = PrivateAttr(default=None)
    _raw_config: RawDataConfig | None = PrivateAttr(default=None)
    _run_lock: Lock | None = PrivateAttr(default=None)
    _progress_bars: ExitStack = PrivateAttr(default_factory=ExitStack)
    _experiments: dict[str, Experiment] | None = PrivateAttr(default=None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Acquire the run lock, fix the run's raw data and settings, and draw progress bars on a terminal.

        Experiments and raw data settings are read once per run; later edits apply to the next run.

        An automatic run uses the raw data that `dolly_raw` read last, even if its source has changed since. All steps
        of the run thus use the same data, and data that arrives while it is queued is left to the next run.
        """
        if not context.run:
            return
        if context.run.remote_job_origin is None:  # otherwise a code server started it, possibly with other runs
            self._progress_bars.enter_context(mirror.owned())
        self._experiments = {}
        self._run_lock = run_liveness.acquire_run_lock(context.run.run_id)
        if AUTOMATIC_TAG in context.run.tags and context.instance:
            self._raw_version = newest_raw_tags(context.instance).get(DATA_VERSION_TAG)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        if self._run_lock:
            run_liveness.release_run_lock(self._run_lock)
        self._progress_bars.close()

    def store(self) -> ArtifactStore:
        return deployment.store()

    def raw(self, asks_hub: bool = False) -> RawLineage:
        """Lineage of the raw data; with `asks_hub`, at the current revision of its source."""
        config = self._raw_config or load_raw_data_config(deployment.configs(), deployment.raw_data())
        if self._experiments is not None:
            self._raw_config = config
        version = None if asks_hub else self._raw_version
        return RawLineage(self.store(), config, deployment.root(), asks_hub, version, deployment.s3_client)

    def experiment(self, name: str) -> Experiment:
        known = {} if self._experiments is None else self._experiments
        if name not in known:
            known[name] = load_experiment(deployment.configs(), name, self.overrides)
        return known[name]

    def lineage(self, experiment: str, asks_hub: bool = False) -> Lineage:
        return Lineage(self.raw(), self.experiment(experiment), asks_hub)
