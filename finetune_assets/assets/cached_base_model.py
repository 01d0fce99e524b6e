"""The base model, once, in the store."""

from pathlib import Path

import dagster as dg

from finetune_assets.assets.making import GROUP, make_once, plain_errors, publish_built, result
from finetune_assets.assets.partitions import experiments
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.lineage import BASE_MODELS


@dg.asset(group_name=GROUP, kinds={"huggingface"}, partitions_def=experiments, code_version="1")
def cached_base_model(context: dg.AssetExecutionContext, project: Project) -> dg.MaterializeResult[ArtifactRef]:
    """Safetensors and tokenizer of the experiment's base model, from the package, a folder, or the Hub at a commit.

    Experiments on the same model at the same commit share one copy.
    """
    from finetune_assets.config.fingerprint import base_model_fingerprint
    from finetune_assets.store.base_models import BaseModelError, collect

    with plain_errors():
        lineage = project.lineage(context.partition_key)
        source = lineage.base_source()
        name = f"{source.repo}/{source.revision}"

        def make() -> ArtifactRef:
            made_from = {"repo": source.repo, "revision": source.revision}
            fingerprint = base_model_fingerprint(source.repo, source.revision)

            def build(folder: Path) -> None:
                collect(source, folder, trusted=lineage.experiment.config.model.trust_remote_code is not None)
                if source.folder and lineage.base_source() != source:
                    raise BaseModelError(f"{source.folder}: changed while it was copied; run cached_base_model again")

            return publish_built(project, BASE_MODELS, name, fingerprint, made_from, build)

        made = make_once(context, project, BASE_MODELS, name, make)
        return result(made, repo=source.repo, revision=source.revision)
