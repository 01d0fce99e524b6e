"""Dagster resource of all assets: the configuration of the run, and the lineage derived from it."""

from contextlib import ExitStack

import dagster as dg
from pydantic import Field, PrivateAttr

from finetune_assets.artifacts.document_lineage import NO_GOOD_INDEX, DocumentLineage
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.artifacts.raw_lineage import NO_GOOD_VERSION, RawLineage
from finetune_assets.config.documents import load_documents
from finetune_assets.config.loading import Experiment, load_experiment, load_raw_data_config
from finetune_assets.config.raw_data_schema import RawDataConfig
from finetune_assets.progress import mirror
from finetune_assets.resources import deployment, run_liveness
from finetune_assets.resources.index_versions import requested_index
from finetune_assets.resources.raw_versions import requested_version
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.locks import Lock

AUTOMATIC_TAG = "finetune/auto_materialize"
"""Tag of a run that automation started."""


class Project(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Configuration and store of one run, identical for all its assets."""

    overrides: list[str] = Field(
        default=[], description="Settings overrides for this run only, such as training.learning_rate=1e-4."
    )
    force: bool = Field(default=False, description="Recompute artifacts even if the store has them.")

    _raw_version: str | None = PrivateAttr(default=None)
    _automatic: tuple[dg.DagsterInstance, dg.DagsterRun] | None = PrivateAttr(default=None)
    _index_versions: dict[str, str] = PrivateAttr(default_factory=dict)
    _raw_config: RawDataConfig | None = PrivateAttr(default=None)
    _run_lock: Lock | None = PrivateAttr(default=None)
    _progress_bars: ExitStack = PrivateAttr(default_factory=ExitStack)
    _experiments: dict[str, Experiment] | None = PrivateAttr(default=None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Acquire the run lock, fix the run's raw data and settings, and draw progress bars on a terminal.

        Experiments and raw data settings are read once per run; later edits apply to the next run.

        An automatic run uses the versions of the raw data and of the retrieval index that it was requested for, even if
        later versions have arrived since, good or bad. All steps of the run thus use the same data.
        """
        if not context.run:
            return
        if context.run.remote_job_origin is None:  # otherwise a code server started it, possibly with other runs
            self._progress_bars.enter_context(mirror.owned())
        self._experiments = {}
        self._run_lock = run_liveness.acquire_run_lock(context.run.run_id)
        if AUTOMATIC_TAG in context.run.tags and context.instance:
            version = requested_version(context.instance, context.run, self.raw().source_name, self.store())
            self._raw_version = version or NO_GOOD_VERSION
            self._automatic = context.instance, context.run

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        if self._run_lock:
            run_liveness.release_run_lock(self._run_lock)
        self._progress_bars.close()

    def store(self) -> ArtifactStore:
        return deployment.store()

    def raw(self, asks_hub: bool = False, version: str | None = None) -> RawLineage:
        """Lineage of the raw data: of a version, or with `asks_hub`, at the current revision of its source."""
        config = self._raw_config or load_raw_data_config(deployment.configs(), deployment.raw_data())
        if self._experiments is not None:
            self._raw_config = config
        version = version or (None if asks_hub else self._raw_version)
        return RawLineage(
            self.store(), config, deployment.root(), asks_hub, version, deployment.s3_client, deployment.configs()
        )

    def documents(self, name: str, asks_hub: bool = False) -> DocumentLineage:
        """Lineage of a document set; with `asks_hub`, at the current revision of its source."""
        return DocumentLineage(name, load_documents(deployment.configs(), name), self.raw(), asks_hub)

    def experiment(self, name: str) -> Experiment:
        known = {} if self._experiments is None else self._experiments
        if name not in known:
            known[name] = load_experiment(deployment.configs(), name, self.overrides)
        return known[name]

    def lineage(self, experiment: str, asks_hub: bool = False) -> Lineage:
        settings = self.experiment(experiment)
        return Lineage(self.raw(), settings, asks_hub, self._index_version(settings))

    def _index_version(self, experiment: Experiment) -> str | None:
        """Version of the retrieval index that an automatic run was requested for; None in any other run."""
        retrieval = experiment.config.data.retrieval
        if retrieval is None or self._automatic is None:
            return None
        name = retrieval.documents
        if name not in self._index_versions:
            self._index_versions[name] = requested_index(*self._automatic, name, self.store()) or NO_GOOD_INDEX
        return self._index_versions[name]
