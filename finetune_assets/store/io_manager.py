"""The store as Dagster sees it: assets hand over references, and get those that their configuration demands."""

import dagster as dg

from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef


class ArtifactIOManager(dg.ConfigurableIOManager):
    """Resolves inputs by fingerprint, never by what was materialized last."""

    project: dg.ResourceDependency[Project]

    def handle_output(self, context: dg.OutputContext, obj: ArtifactRef) -> None:
        """Refuse to hand on what is not whole in the store."""
        self.project.store().resolve(obj.kind, obj.name, made_by=context.asset_key.to_user_string())

    def load_input(self, context: dg.InputContext) -> ArtifactRef:
        """The artifact of the upstream asset that this run's configuration and data demand."""
        name = context.asset_key.to_user_string()
        try:
            if name == "dolly_raw":
                return self.project.raw().raw()
            lineage = self.project.lineage(context.asset_partition_key)
            resolvers = {
                "cached_base_model": lineage.base_model,
                "tokenized_dataset": lineage.tokenized,
                "lora_adapter": lineage.adapter,
                "adapter_evaluation": lineage.evaluation,
                "champion_adapter": lineage.champion,
            }
            return resolvers[name]()
        except UserError as e:
            raise dg.Failure(str(e), allow_retries=False) from None
