"""IO manager of the artifact store: assets pass references, and inputs are resolved from the configuration."""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import KIND_OF, RAW
from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef


class ArtifactIOManager(dg.ConfigurableIOManager):
    """Resolves inputs by fingerprint, never by the latest materialization.

    Attributes:
        project: Configuration of the run, and the store.
        others: Stores the outputs of assets that are not in the registry of artifact kinds: those of users.
    """

    project: dg.ResourceDependency[Project]
    others: dg.ResourceDependency[dg.IOManager]

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Raise an error unless the artifact is complete in the store; hand other outputs on."""
        asset = context.asset_key.to_user_string()
        if asset not in KIND_OF:
            self.others.handle_output(context, obj)
            return
        if obj is not None:  # None is the index of an experiment that retrieves nothing
            self.project.store().resolve(obj.kind, obj.name, made_by=asset)

    def load_input(self, context: dg.InputContext) -> Any:
        """Return the upstream artifact that matches this run's configuration and data.

        An input of several partitions is a dictionary of artifacts by experiment. With the metadata
        `allow_missing_partitions`, as Dagster's own IO managers have it, experiments without the artifact are left out.
        """
        kind = KIND_OF.get(context.asset_key.to_user_string())
        if kind is None:
            return self.others.load_input(context)
        try:
            if kind is RAW:
                return self.project.raw().raw()
            experiments = context.asset_partition_keys
            if len(experiments) == 1:
                return self.project.lineage(experiments[0]).expected(kind)
            return self._by_experiment(context, experiments)
        except UserError as e:
            raise dg.Failure(str(e), allow_retries=False) from None

    def _by_experiment(self, context: dg.InputContext, experiments: Sequence[str]) -> dict[str, ArtifactRef]:
        kind = KIND_OF[context.asset_key.to_user_string()]
        artifacts = {}
        for experiment in experiments:
            try:
                artifacts[experiment] = self.project.lineage(experiment).expected(kind)
            except UserError:
                if not context.definition_metadata.get("allow_missing_partitions"):
                    raise
        return artifacts
