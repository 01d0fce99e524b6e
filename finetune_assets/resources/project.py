"""What every asset is given: the configuration of this run, and the lineage that follows from it."""

from collections.abc import Mapping
from contextlib import ExitStack

import dagster as dg
from pydantic import Field, PrivateAttr

from finetune_assets.artifacts.lineage import Lineage, RawLineage
from finetune_assets.config.loading import Experiment, load_experiment, load_raw_data_config
from finetune_assets.config.schema import RawDataConfig
from finetune_assets.progress import mirror
from finetune_assets.resources import deployment, run_liveness
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.locks import Lock

DATA_VERSION_TAG = "dagster/data_version"
OVERRIDES_TAG = "finetune/overrides"
"""On a materialization: the settings that its run alone had. Nothing that happens by itself goes by it."""
GOOD_TAG = "finetune/good"
"""On a materialization of `dolly_raw`: its blocking checks passed. Later versions are compared with it."""
AUTOMATIC_TAG = "finetune/auto_materialize"
"""On a run: no human started it."""


def newest_raw_tags(instance: dg.DagsterInstance) -> Mapping[str, str]:
    """Tags of the newest materialization of `dolly_raw`; none where there is none."""
    last = instance.get_latest_materialization_event(dg.AssetKey("dolly_raw"))
    return (last.asset_materialization.tags if last and last.asset_materialization else None) or {}


class Project(dg.ConfigurableResource):  # type: ignore[type-arg]
    """One run's view of configuration and store; every asset of the run sees the same."""

    overrides: list[str] = Field(
        default=[], description="Settings of this run alone, such as training.learning_rate=1e-4."
    )
    force: bool = Field(default=False, description="Make artifacts anew even if the store has them.")

    _raw_version: str | None = PrivateAttr(default=None)
    _raw_config: RawDataConfig | None = PrivateAttr(default=None)
    _alive: Lock | None = PrivateAttr(default=None)
    _drawn: ExitStack = PrivateAttr(default_factory=ExitStack)
    _experiments: dict[str, Experiment] | None = PrivateAttr(default=None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Show that the run lives, and settle on its raw data and its settings. Where a person looks on, draw bars.

        An experiment and the settings of the raw data are read once a run: what is edited meanwhile is for the next.

        A run that no human started takes the raw data that `dolly_raw` read last, whatever its source is by now. So all
        its steps agree, and data that arrives while it waits is left to the run that follows.
        """
        if not context.run:
            return
        if context.run.remote_job_origin is None:  # else a server did, maybe beside others
            self._drawn.enter_context(mirror.owned())
        self._experiments = {}
        self._alive = run_liveness.hold(context.run.run_id)
        if AUTOMATIC_TAG in context.run.tags and context.instance:
            self._raw_version = newest_raw_tags(context.instance).get(DATA_VERSION_TAG)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        if self._alive:
            run_liveness.release(self._alive)
        self._drawn.close()

    def store(self) -> ArtifactStore:
        return deployment.store()

    def raw(self, asks_hub: bool = False) -> RawLineage:
        """The raw data; with `asks_hub`, as its source is now."""
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
