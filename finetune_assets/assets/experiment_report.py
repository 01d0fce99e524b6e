"""Asset `experiment_report`: an overview of all experiments, and a page for each of them."""

from pathlib import Path

import dagster as dg

from finetune_assets.artifacts.kinds import REPORTS
from finetune_assets.artifacts.layout import PAGE, PAGE_MARKDOWN
from finetune_assets.assets.materialization import asset_step, materialize_or_reuse, publish_built, result
from finetune_assets.assets.partitions import project_asset
from finetune_assets.automation.reports import newer
from finetune_assets.resources import deployment
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef

LAST = {"dagster/priority": "-1"}
"""Lowest step priority, so that the report is the last step of a run. It covers champions, stacked and served
adapters, but cannot depend on them: Dagster skips downstream assets of an asset that is not materialized, and not every
experiment has a champion."""


@project_asset(
    REPORTS,
    "matplotlib",
    op_tags=LAST,
    deps=[dg.AssetDep("adapter_evaluation", partition_mapping=dg.AllPartitionMapping())],
    automation_condition=newer("adapter_evaluation", "champion_adapter", "stacked_adapter", "served_adapter"),
)
def experiment_report(context: dg.AssetExecutionContext, project: Project) -> dg.MaterializeResult[ArtifactRef]:
    """An overview of all experiments, and a page for each: runs, champions, served versions, lineage and settings.

    The report reads the artifact store and not Dagster's event log. It can be materialized at any time, even before
    the first training.
    """
    from finetune_assets.reporting.collect import collect
    from finetune_assets.reporting.pages import write

    with asset_step(context, retried=True):
        report = collect(project.store(), deployment.configs())
        for problem in report.problems:
            context.log.warning(f"Not in the report: {problem}")

        def build(folder: Path) -> None:
            write(report, folder, project.store().cache.derived)

        def make() -> ArtifactRef:
            # No adapter fingerprints: a report must not protect the adapters it lists from garbage collection
            made_from = {
                "experiments": len(report.experiments),
                "runs": sum(len(experiment.runs) for experiment in report.trained),
            }
            return publish_built(project, REPORTS, report.fingerprint, report.fingerprint, made_from, build)

        outcome = materialize_or_reuse(context, project, REPORTS, report.fingerprint, make)
        folder = project.store().fetch(outcome.ref, lambda path: path == PAGE_MARKDOWN)
        return result(
            outcome,
            experiments=len(report.experiments),
            experiments_with_a_run=len(report.trained),
            champions=sum(experiment.champion is not None for experiment in report.experiments),
            unreadable_experiments=sum(bool(experiment.error) for experiment in report.experiments)
            + len(report.problems),
            page=dg.MetadataValue.path(f"{outcome.ref.uri}/{PAGE}".removeprefix("file://")),
            report=dg.MetadataValue.md((folder / PAGE_MARKDOWN).read_text(encoding="utf-8")),
        )
