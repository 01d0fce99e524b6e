"""Asset `cached_base_model`: the base model in the artifact store."""

import dagster as dg

from finetune_assets.artifacts.kinds import BASE_MODELS
from finetune_assets.assets.materialization import asset_step, materialize_or_reuse, overridden, result
from finetune_assets.assets.partitions import project_asset
from finetune_assets.automation.conditions import HasGoodData, auto_materialize
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef


@project_asset(
    BASE_MODELS,
    "huggingface",
    pool="hub",
    automation_condition=auto_materialize(only_while=HasGoodData()),
)
def cached_base_model(context: dg.AssetExecutionContext, project: Project) -> dg.MaterializeResult[ArtifactRef]:
    """Safetensors weights and tokenizer of the experiment's base model.

    It comes from the package, a folder, a GGUF file or a Hub commit.

    Experiments that use the same model at the same commit share one copy. When a branch moves, its new commit is
    stored as an additional copy.
    """
    from finetune_assets.sources.base_models import collect

    with asset_step(context):
        lineage = project.lineage(context.partition_key, asks_hub=True)
        source = lineage.base_source()
        name = f"{source.repo}/{source.revision}"

        def make() -> ArtifactRef:
            with lineage.store.cache.workspace("build") as workspace:
                files, hashes = collect(source, lineage.trusts_own_code, workspace)
                ref = lineage.store.publish(
                    files,
                    BASE_MODELS.folder,
                    name,
                    BASE_MODELS.fingerprint(None, repo=source.repo, revision=source.revision),
                    made_from={"repo": source.repo, "revision": source.revision},
                    replace=project.force,
                    expected=hashes,
                )
            if source.folder is None:
                lineage.pins.record_hashes(source.repo, source.revision, hashes)
            return ref

        outcome = materialize_or_reuse(context, project, BASE_MODELS, name, make, find=lineage.find_base_model)
        lineage.pins.record()
        return result(outcome, tags=overridden(lineage.experiment), repo=source.repo, revision=source.revision)
