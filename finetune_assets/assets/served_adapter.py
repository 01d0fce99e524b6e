"""Asset `served_adapter`: the champion on the servers that answer users, verified by numbers."""

from collections.abc import Iterator

import dagster as dg

from finetune_assets.artifacts.kinds import SERVED
from finetune_assets.assets.materialization import (
    ARTIFACT,
    Outcome,
    asset_step,
    check_skipped,
    lineage_tags,
    result,
)
from finetune_assets.assets.partitions import check_of_each, project_asset
from finetune_assets.automation.conditions import auto_materialize
from finetune_assets.resources import deployment
from finetune_assets.resources.project import Project
from finetune_assets.serving.rollout import Rollout, Serving, numbers_of
from finetune_assets.serving.servers import servers_of
from finetune_assets.store.artifacts import ArtifactRef

VERIFIED = "verified"
"""Name of the check that reports what the servers answer with."""


@project_asset(
    SERVED,
    "vllm",
    dagster_type=ARTIFACT,
    output_required=False,
    automation_condition=auto_materialize("champion_adapter", always_made=False),
    check_specs=[
        check_of_each(
            "served_adapter",
            VERIFIED,
            "Each server's log-probabilities of gate rows agree with the champion's in its evaluation, and differ from "
            "the base model's and the previous champion's, in completions and in chat. Otherwise the adapter before "
            "keeps serving.",
        )
    ],
)
def served_adapter(
    context: dg.AssetExecutionContext, champion_adapter: ArtifactRef, project: Project
) -> Iterator[dg.MaterializeResult[ArtifactRef] | dg.AssetCheckResult]:
    """The champion on the experiment's servers: loaded, verified by log-probabilities of held-out answers, and served.

    Materialized only for experiments with `serving` settings.
    """
    with asset_step(context):
        lineage = project.lineage(context.partition_key)
        name, store = lineage.experiment.name, lineage.store
        servers = servers_of(lineage.experiment.config, deployment.root())
        if servers is None:
            yield check_skipped(context, VERIFIED, f"experiment {name} has no `serving` settings")
            return
        champion = lineage.champions.current()
        if champion is None:
            yield check_skipped(context, VERIFIED, f"experiment {name} has no champion yet")
            return
        serving = Serving(lineage, servers, context.log.info, f"run {context.run.run_id}")
        with store.cache.exclusive(store.prefix(SERVED.folder, name), f"serving {name}"):
            rollout = serving.serve(champion)
        for note in rollout.notes:
            context.log.warning(note)
        check = verified(context, rollout)
        if not rollout.passed or rollout.serves is None:
            yield check
            return
        yield result(
            Outcome(champion_adapter, not rollout.moved, 0.0),
            [check],
            lineage_tags(lineage),
            serves=rollout.serves.name,
            previous=rollout.serves.previous or "",
            servers=dg.MetadataValue.json(servers.shown),
            record=rollout.serves.number,
            champion=champion.number,
        )


def verified(context: dg.AssetExecutionContext, rollout: Rollout) -> dg.AssetCheckResult:
    """Result of the check: the numbers of the first server that failed, or of the last one."""
    failed = [verdict for verdict in rollout.verdicts.values() if not verdict.passed]
    still = rollout.serves.name if rollout.serves else "the base model alone"
    reasons = "; ".join(verdict.reason for verdict in failed or rollout.verdicts.values())
    text = f"{reasons}. {still} keeps serving" if failed else reasons
    if failed:
        context.log.error(f"Check {VERIFIED} failed: {text}")
    numbers = {key: value for key, value in numbers_of(rollout).items() if isinstance(value, int | float | str)}
    return dg.AssetCheckResult(
        passed=not failed,
        check_name=VERIFIED,
        description=text or f"{rollout.name} is complete in each folder; no server is asked",
        metadata={
            **numbers,
            "servers": len(rollout.verdicts),
            "diagnosis": failed[0].diagnosis if failed else "",
            "serves": still,
        },
    )
