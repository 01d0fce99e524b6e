"""All experiments on one page."""

from pathlib import Path

import dagster as dg

from finetune_assets.artifacts.kinds import REPORTS
from finetune_assets.artifacts.layout import PAGE, PAGE_MARKDOWN
from finetune_assets.assets.materialization import GROUP, asset_step, materialize_or_reuse, publish_built, result
from finetune_assets.automation.reports import newer
from finetune_assets.resources import deployment
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef

LAST = {"dagster/priority": "-1"}
"""Of the steps of a run that could be next, this one is last: it tells of champions and stacks too, and cannot depend
on them, as Dagster skips what depends on an asset that is not made, and not every experiment has a champion."""


@dg.asset(
    group_name=GROUP,
    kinds={"matplotlib"},
    code_version=REPORTS.code_version,
    op_tags=LAST,
    deps=[dg.AssetDep("adapter_evaluation", partition_mapping=dg.AllPartitionMapping())],
    automation_condition=newer("adapter_evaluation", "champion_adapter", "stacked_adapter"),
)
def experiment_report(context: dg.AssetExecutionContext, project: Project) -> dg.MaterializeResult[ArtifactRef]:
    """Every experiment with its latest runs, its champion and how its settings differ, on one page.

    It is made of what the store holds, not of what Dagster remembers: it can be materialized at any time, also before
    anything was trained.
    """
    from finetune_assets.reporting.collect import collect
    from finetune_assets.reporting.pages import write

    with asset_step(context, retried=True):
        report = collect(project.store(), deployment.configs())
        for problem in report.problems:
            context.log.warning(f"Not in the report: {problem}")

        def build(folder: Path) -> None:
            write(report, folder)

        def make() -> ArtifactRef:
            # No fingerprint of an adapter: a page must not keep from garbage collection what it tells of
            made_from = {"experiments": len(report.experiments), "runs": sum(len(one.runs) for one in report.trained)}
            return publish_built(project, REPORTS, report.fingerprint, report.fingerprint, made_from, build)

        made = materialize_or_reuse(context, project, REPORTS, report.fingerprint, make)
        folder = project.store().fetch(made.ref, lambda path: path == PAGE_MARKDOWN)
        return result(
            made,
            experiments=len(report.experiments),
            experiments_with_a_run=len(report.trained),
            champions=sum(one.champion is not None for one in report.experiments),
            unreadable_experiments=sum(bool(one.error) for one in report.experiments) + len(report.problems),
            page=dg.MetadataValue.path(f"{made.ref.uri}/{PAGE}".removeprefix("file://")),
            report=dg.MetadataValue.md((folder / PAGE_MARKDOWN).read_text(encoding="utf-8")),
        )
