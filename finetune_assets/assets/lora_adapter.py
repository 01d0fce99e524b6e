"""Asset `lora_adapter`: trains the adapter."""

from dataclasses import asdict, replace
from typing import Any

import dagster as dg

from finetune_assets.artifacts import provenance
from finetune_assets.artifacts.base_identity import check_warm_start
from finetune_assets.artifacts.history import predicted, read_plan, side_by_side
from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.artifacts.layout import CHAMPION_AT_START, HELD_BACK, JUDGED_ADAPTERS, SOURCES, TRAINER_STATE
from finetune_assets.artifacts.lineage import CHAMPION, Lineage
from finetune_assets.artifacts.references import find_reference, publish_reference
from finetune_assets.assets.materialization import (
    asset_step,
    job,
    lineage_tags,
    materialize_or_reuse,
    refuse_stacked_experiment,
    result,
)
from finetune_assets.assets.partitions import project_asset
from finetune_assets.assets.pictures import is_drawn, of_plan
from finetune_assets.assets.pictures import of_training as pictures
from finetune_assets.automation.budget import GPU_HOURS, WithinDailyGpuBudget
from finetune_assets.automation.conditions import auto_materialize
from finetune_assets.launch.engines import Launcher
from finetune_assets.launch.pipes import run_in_pipes
from finetune_assets.reporting.numbers import Numbers, of_training, with_cost
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.json_object import read_json
from finetune_assets.worker.job import JobSpec


@project_asset(
    ADAPTERS,
    "pytorch",
    pool="gpu",
    deps=["training_plan"],  # its check blocks training; users can select lora_adapter without it
    automation_condition=auto_materialize(
        "training_plan", "tokenized_dataset", "cached_base_model", only_while=WithinDailyGpuBudget()
    ),
)
def lora_adapter(
    context: dg.AssetExecutionContext,
    tokenized_dataset: ArtifactRef,
    cached_base_model: ArtifactRef,
    project: Project,
    launcher: dg.ResourceParam[Launcher],
) -> dg.MaterializeResult[ArtifactRef]:
    """A LoRA adapter in safetensors, trained by `torchrun`, with tokenizer, settings, log and provenance."""
    with asset_step(context, retried=True):
        lineage = project.lineage(context.partition_key)
        refuse_stacked_experiment(lineage.experiment)
        upstream = {"tokenized_dataset": tokenized_dataset, "cached_base_model": cached_base_model}
        check_warm_start(lineage, cached_base_model, tokenized_dataset=tokenized_dataset)
        imported = lineage.import_external_inputs(**upstream)  # invalid inputs fail here, before hours of training
        fingerprint = lineage.fingerprint(ADAPTERS, **upstream)

        def make() -> ArtifactRef:
            begun = {name: imported[name] for name in ("warm_start", "reference") if name in imported}
            spec = training_job(project, lineage, fingerprint, tokenized_dataset, cached_base_model, **begun)
            spec = replace(spec, ignore_checkpoints=project.force and context.retry_number == 0)
            adapter = run_in_pipes(context, launcher, spec)
            publish_reference(lineage, adapter, tokenized_dataset, cached_base_model, imported.get("reference"))
            return adapter

        outcome = materialize_or_reuse(context, project, ADAPTERS, fingerprint, make)
        metadata = _describe(project, lineage, outcome.ref)
        if not outcome.hit:
            metadata[GPU_HOURS] = metadata["device_hours"]
        elif lineage.experiment.config.wandb and "wandb_run" not in metadata:
            context.log.warning("No W&B run for this adapter: it was trained without W&B and is not retrained")
        return result(outcome, tags=lineage_tags(lineage), **metadata)


def training_job(
    project: Project,
    lineage: Lineage,
    fingerprint: str,
    dataset: ArtifactRef,
    base_model: ArtifactRef,
    warm_start: ArtifactRef | None = None,
    reference: ArtifactRef | None = None,
) -> JobSpec:
    """Build the job that the launcher runs to train one experiment."""
    experiment = lineage.experiment
    repo, _, revision = base_model.name.rpartition("/")
    raw = lineage.store.manifest(dataset.kind, dataset.name)
    judged = provenance.texts_by_name(raw.made_from, JUDGED_ADAPTERS) if raw else {}
    log_probs = find_reference(lineage, dataset, base_model, reference)
    optional = {"warm-start": warm_start, "reference": reference, "reference-log-probs": log_probs}
    begun = warm_start if experiment.config.training.warm_start == CHAMPION else reference
    return job(
        project,
        experiment,
        module="finetune_assets.training",
        inputs={"base-model": base_model, "dataset": dataset, **{name: ref for name, ref in optional.items() if ref}},
        kind=ADAPTERS.folder,
        fingerprint=fingerprint,
        made_from={
            "fingerprint": fingerprint,
            "experiment": experiment.name,
            "overrides": list(experiment.overrides),
            "base_model": repo,
            "revision": revision,
            "cached_base_model": base_model.fingerprint,
            "tokenized_dataset": dataset.fingerprint,
            "dolly_raw": provenance.text(raw.made_from, "dolly_raw") if raw else None,
            "retrieval_index": provenance.text(raw.made_from, "retrieval_index") if raw else None,
            SOURCES: lineage.source_names(),
            "warm_start": warm_start.fingerprint if warm_start else None,
            **({CHAMPION_AT_START: begun.fingerprint} if begun else {}),
            HELD_BACK: asdict(lineage.held_back(*([warm_start] if warm_start else []))),
            **({JUDGED_ADAPTERS: judged} if judged else {}),
        },
        processes=experiment.config.training.processes_per_node,
        nodes=experiment.config.launcher.node_range,
        rendezvous_seconds=experiment.config.launcher.rendezvous_seconds,
        scratch=True,
        keep_checkpoints=experiment.config.training.save_total_limit,
    )


def _describe(project: Project, lineage: Lineage, ref: ArtifactRef) -> dict[str, Any]:
    folder = project.store().fetch(ref, lambda path: path == TRAINER_STATE or is_drawn(path))
    state = read_json(folder / TRAINER_STATE, f"{ref.kind}/{ref.name}")
    metrics = with_cost(of_training(state), lineage.experiment.config.hardware.price_per_hour)
    return {
        **metrics,
        "runtime": dg.MetadataValue.json(state["active"]),
        **pictures(folder, state, project.store().cache.derived),
        **_wandb(state.get("wandb") or {}),
        **_plan_comparison(lineage, ref, metrics),
    }


def _plan_comparison(lineage: Lineage, ref: ArtifactRef, metrics: Numbers) -> dict[str, object]:
    """Predicted values next to the measured ones, if the training has a plan."""
    from finetune_assets.data.tables import rows_table

    if (planned := lineage.plan(ref.fingerprint)) is None:
        return {}
    plan = read_plan(lineage.store, planned)
    rows = rows_table(side_by_side(plan, metrics), ["", "predicted", "measured", "difference"])
    return {
        **{f"predicted_{name}": value for name, value in predicted(plan).items() if name in metrics},
        "prediction_vs_actual": dg.MetadataValue.md(rows),
        **of_plan(plan, lineage.store.cache.derived, metrics.get("peak_memory_mib")),
    }


def _wandb(run: dict[str, str]) -> dict[str, dg.MetadataValue[str]]:
    """URL of the training's W&B run, or the folder of an offline run and the command that uploads it."""
    if "url" in run:
        artifact = {"wandb_artifact": dg.MetadataValue.text(run["artifact"])} if "artifact" in run else {}
        return {"wandb_run": dg.MetadataValue.url(run["url"]), **artifact}
    if "folder" in run:
        folder, sync = dg.MetadataValue.path(run["folder"]), dg.MetadataValue.text(run["sync"])
        return {"wandb_run": folder, "wandb_sync": sync}
    return {}
