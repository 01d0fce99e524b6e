"""The store as Dagster sees it: assets pass references, and receive those that their configuration demands."""

import dagster as dg

from finetune_assets.artifacts.kinds import KIND_OF, RAW
from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef


class ArtifactIOManager(dg.ConfigurableIOManager):
    """Resolves inputs by fingerprint, never by what was materialized last."""

    project: dg.ResourceDependency[Project]

    def handle_output(self, context: dg.OutputContext, obj: ArtifactRef) -> None:
        """Fail unless the artifact is complete in the store."""
        self.project.store().resolve(obj.kind, obj.name, made_by=context.asset_key.to_user_string())

    def load_input(self, context: dg.InputContext) -> ArtifactRef:
        """The artifact of the upstream asset that this run's configuration and data demand."""
        kind = KIND_OF[context.asset_key.to_user_string()]
        try:
            if kind is RAW:
                return self.project.raw().raw()
            return self.project.lineage(context.asset_partition_key).expected(kind)
        except UserError as e:
            raise dg.Failure(str(e), allow_retries=False) from None
