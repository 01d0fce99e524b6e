"""Asset `stacked_adapter`: combines champions of several experiments into one adapter and evaluates it."""

from collections.abc import Iterator
from dataclasses import asdict

import dagster as dg

from finetune_assets.artifacts.kinds import STACKS
from finetune_assets.artifacts.layout import HELD_BACK
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.assets.materialization import (
    ARTIFACT,
    asset_step,
    check_skipped,
    job,
    lineage_tags,
    materialize_or_reuse,
    result,
)
from finetune_assets.assets.partitions import check_of_each, project_asset
from finetune_assets.assets.promotion import GATE, evaluate, evaluation_metadata, promote_if_better, wandb_metadata
from finetune_assets.automation.conditions import auto_materialize
from finetune_assets.launch.engines import Launcher
from finetune_assets.launch.pipes import run_in_pipes
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef


@project_asset(
    STACKS,
    "pytorch",
    dagster_type=ARTIFACT,
    output_required=False,
    deps=[dg.AssetDep("champion_adapter", partition_mapping=dg.AllPartitionMapping())],
    check_specs=[
        check_of_each(
            "stacked_adapter",
            GATE,
            "The combined adapter is the champion: it improves on the previous champion (or the base model) beyond "
            "noise.",
            blocking=False,
        )
    ],
    automation_condition=auto_materialize(
        "tokenized_dataset", "cached_base_model", apart=["champion_adapter"], always_made=False
    ),
)
def stacked_adapter(
    context: dg.AssetExecutionContext,
    tokenized_dataset: ArtifactRef,
    cached_base_model: ArtifactRef,
    project: Project,
    launcher: dg.ResourceParam[Launcher],
) -> Iterator[dg.MaterializeResult[ArtifactRef] | dg.AssetCheckResult]:
    """One adapter combined from the champions that the experiment's `stack` settings name; skipped without them.

    Uses the current champions, which belong to other partitions of `champion_adapter`.
    """
    from finetune_assets.evaluation.files import read_evaluation

    with asset_step(context, retried=True):
        lineage = project.lineage(context.partition_key)
        if lineage.experiment.config.stack is None:
            yield check_skipped(context, GATE, f"experiment {lineage.experiment.name} has no `stack` settings")
            return
        parts = lineage.stacked_from(cached_base_model)
        fingerprint = lineage.fingerprint(STACKS, cached_base_model=cached_base_model)

        def make() -> ArtifactRef:
            spec = job(
                project,
                lineage.experiment,
                module="finetune_assets.merging.stacking",
                inputs={"base-model": cached_base_model, **_as_inputs(parts)},
                kind=STACKS.folder,
                fingerprint=fingerprint,
                made_from=_made_from(lineage, fingerprint, parts, cached_base_model),
            )
            return run_in_pipes(context, launcher, spec)

        outcome = materialize_or_reuse(context, project, STACKS, fingerprint, make)
        evaluation_outcome = evaluate(
            context, project, launcher, lineage, outcome.ref, tokenized_dataset, cached_base_model
        )
        decision = promote_if_better(lineage, outcome.ref, evaluation_outcome.ref, by=f"run {context.run.run_id}")
        context.log.info(decision.reason)
        champion = wandb_metadata(context, lineage, decision)
        evaluation = read_evaluation(project.store().fetch(evaluation_outcome.ref))
        yield result(
            outcome,
            [decision.check_result],
            lineage_tags(lineage),
            decision=decision.reason,
            **champion,
            stacked_from=dg.MetadataValue.json({name: ref.fingerprint for name, ref in parts.items()}),
            **evaluation_metadata(evaluation, project.store().cache.derived),
        )


def _as_inputs(parts: dict[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    return {f"adapter-{index}": ref for index, ref in enumerate(parts.values())}


def _made_from(
    lineage: Lineage, fingerprint: str, parts: dict[str, ArtifactRef], base_model: ArtifactRef
) -> dict[str, object]:
    repo, _, revision = base_model.name.rpartition("/")
    return {
        "fingerprint": fingerprint,
        "experiment": lineage.experiment.name,
        "overrides": list(lineage.experiment.overrides),
        "base_model": repo,
        "revision": revision,
        "cached_base_model": base_model.fingerprint,
        "champions": {name: ref.fingerprint for name, ref in parts.items()},
        HELD_BACK: asdict(lineage.held_back(*parts.values())),
    }
