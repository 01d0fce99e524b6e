"""What every asset is given: the configuration of this run, and the lineage that follows from it."""

import dagster as dg
from pydantic import Field

from finetune_assets.config.loading import Experiment, load_experiment, load_raw_data_config
from finetune_assets.resources import deployment
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.lineage import Lineage, RawLineage


class Project(dg.ConfigurableResource):  # type: ignore[type-arg]
    """One run's view of configuration and store; every asset of the run sees the same."""

    overrides: list[str] = Field(
        default=[], description="Settings of this run alone, such as training.learning_rate=1e-4."
    )
    force: bool = Field(default=False, description="Make artifacts anew even if the store has them.")

    def store(self) -> ArtifactStore:
        return deployment.store()

    def raw(self, asks_hub: bool = False) -> RawLineage:
        config = load_raw_data_config(deployment.configs(), deployment.raw_data())
        return RawLineage(self.store(), config, deployment.root(), asks_hub)

    def experiment(self, name: str) -> Experiment:
        return load_experiment(deployment.configs(), name, self.overrides)

    def lineage(self, experiment: str, asks_hub: bool = False) -> Lineage:
        return Lineage(self.raw(), self.experiment(experiment), asks_hub)
