"""Asset `training_plan`: predicted memory, time and cost of a training."""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts.base_identity import check_warm_start
from finetune_assets.artifacts.history import predicted, read_plan, trainer_states
from finetune_assets.artifacts.kinds import ADAPTERS, PLANS
from finetune_assets.artifacts.layout import read_object
from finetune_assets.assets.materialization import (
    ARTIFACT,
    asset_step,
    lineage_tags,
    materialize_or_reuse,
    publish_built,
    refuse_stacked_experiment,
    result,
)
from finetune_assets.assets.partitions import check_of_each, project_asset
from finetune_assets.assets.pictures import of_plan
from finetune_assets.automation.conditions import SERVABLE_CHECK, auto_materialize
from finetune_assets.config.loading import dump
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.display import code, markdown, message
from finetune_assets.launch.local import run_alone
from finetune_assets.resources.project import Project
from finetune_assets.serving.servable import problems
from finetune_assets.sources.base_models import is_shape_file
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.results import Results


@project_asset(
    PLANS,
    "pytorch",
    dagster_type=ARTIFACT,
    check_specs=[
        check_of_each(
            "training_plan",
            "fits",
            "The training's peak memory fits the hardware in the settings, or this machine. Otherwise training is "
            "blocked, and the check lists settings that fit.",
        ),
        check_of_each(
            "training_plan",
            SERVABLE_CHECK,
            "A vLLM server can serve the adapter that these settings train. Otherwise the check lists settings that it "
            "can serve; it warns only, except for experiments with `serving` settings, whose training is blocked.",
        ),
    ],
    automation_condition=auto_materialize("tokenized_dataset", "cached_base_model"),
)
def training_plan(
    context: dg.AssetExecutionContext,
    tokenized_dataset: ArtifactRef,
    cached_base_model: ArtifactRef,
    project: Project,
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Predicted memory by part, steps, tokens, hours and cost of a training.

    The prediction uses shapes only: it reads no weights and occupies no GPU. An adapter that is already in the store
    keeps the plan of its training.
    """
    with asset_step(context):
        lineage = project.lineage(context.partition_key)
        refuse_stacked_experiment(lineage.experiment)
        check_warm_start(lineage, cached_base_model, tokenized_dataset=tokenized_dataset)
        adapter = lineage.fingerprint(
            ADAPTERS, tokenized_dataset=tokenized_dataset, cached_base_model=cached_base_model
        )
        name = PLANS.fingerprint(lineage.experiment.config, lora_adapter=adapter)

        def build(folder: Path) -> None:
            store = project.store()
            with store.cache.workspace("plan") as workspace:
                (workspace / "config.yaml").write_text(dump(lineage.experiment.config), encoding="utf-8")
                (workspace / "states.json").write_text(json.dumps([*trainer_states(store)]), encoding="utf-8")
                inputs = {
                    "config": workspace / "config.yaml",
                    "states": workspace / "states.json",
                    "base-model": store.fetch(cached_base_model, is_shape_file),
                    "dataset": store.fetch(tokenized_dataset),
                    "results": store.cache.simulations,
                    "output": folder,
                }
                run_alone("finetune_assets.preflight", inputs, store.cache.root)

        def make() -> ArtifactRef:
            made_from = {"experiment": lineage.experiment.name, "lora_adapter": adapter}
            return publish_built(project, PLANS, name, name, made_from, build, replace=True)

        trained = project.store().find(ADAPTERS.folder, adapter) is not None
        outcome = materialize_or_reuse(context, project, PLANS, name, make, force=not trained)
        plan = read_plan(project.store(), outcome.ref)
        shape = project.store().fetch(cached_base_model, is_shape_file)
        checks = [
            _fit_check(context, plan, outcome.hit),
            _servable_check(context, lineage.experiment.config, read_object(shape / "config.json")),
        ]
        return result(outcome, checks, lineage_tags(lineage), **_metadata(plan, project.store().cache.derived))


def _fit_check(context: dg.AssetExecutionContext, plan: dict[str, Any], trained: bool) -> dg.AssetCheckResult:
    message = f"Plan reused: the adapter is already trained. {plan['summary']}" if trained else plan["summary"]
    if not plan["fits"]:
        message += ". To train anyway, materialize lora_adapter without training_plan"
    (context.log.info if plan["fits"] else context.log.error)(message)
    numbers = {name: plan[name] for name in ("peak_memory_mib", "usable_mib") if plan[name] is not None}
    return dg.AssetCheckResult(
        passed=plan["fits"],
        check_name="fits",
        description=message,
        metadata={
            **numbers,
            "advice": dg.MetadataValue.md("\n".join(f"- {code(setting)}" for setting in plan["advice"]) or "none"),
        },
    )


def _servable_check(
    context: dg.AssetExecutionContext, config: ExperimentConfig, base: dict[str, Any]
) -> dg.AssetCheckResult:
    """Result of the check `servable`.

    Args:
        context: Context of the asset step; a failure is written to its log.
        config: The experiment's settings.
        base: Content of the base model's `config.json`.
    """
    found = problems(config, base)
    blocks = config.serving is not None and any(problem.refused for problem in found)
    text = message(". ".join(map(str, found))) if found else "Servable"
    if found:
        (context.log.error if blocks else context.log.warning)(f"Check {SERVABLE_CHECK} failed: {text}")
    return dg.AssetCheckResult(
        passed=not found,
        check_name=SERVABLE_CHECK,
        severity=dg.AssetCheckSeverity.ERROR if blocks else dg.AssetCheckSeverity.WARN,
        description=text,
        metadata={
            "problems": len(found),
            "remedies": dg.MetadataValue.md(
                "\n".join(f"- {markdown(problem.what)}: {markdown(problem.remedy)}" for problem in found) or "none"
            ),
        },
    )


def _metadata(plan: dict[str, Any], drawn: Results) -> dict[str, Any]:
    """Metadata of a plan; predicted values have the names of the values measured later, for Dagster's plots."""
    from finetune_assets.data.tables import rows_table

    evaluations = plan["evaluations"] or {}
    count, fewest = (evaluations.get(name) for name in ("count", "fewest_steps"))
    rows = [{"part": part, "MiB": f"{size:,.1f}"} for part, size in plan["memory_mib"].items()]
    return {
        **{f"predicted_{name}": value for name, value in predicted(plan).items()},
        "usable_memory_mib": plan["usable_mib"],
        "hardware": f"{plan['device']['processes']} x {plan['device']['name']}",
        "time_estimate_source": plan["known_from"],
        "gradient_checkpointing": plan["gradient_checkpointing"],
        **({"evaluations": count} if count else {}),
        **({"fewest_steps": fewest} if fewest and fewest < plan["work"]["steps"] else {}),
        "memory": dg.MetadataValue.md(rows_table(rows, ["part", "MiB"])),
        **of_plan(plan, drawn),
    }
