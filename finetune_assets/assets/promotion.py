"""Evaluation and promotion of adapters, the same for trained and stacked ones."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import dagster as dg

from finetune_assets.artifacts.base_identity import RecordedBase
from finetune_assets.artifacts.champions import PROMOTED, Record
from finetune_assets.artifacts.kinds import EVALUATIONS
from finetune_assets.artifacts.layout import HELD_BACK
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.assets.materialization import Outcome, job, materialize_or_reuse
from finetune_assets.assets.pictures import of_evaluation as pictures
from finetune_assets.config.retrieval_validation import gate_mode
from finetune_assets.launch.engines import Launcher
from finetune_assets.launch.pipes import run_in_pipes
from finetune_assets.reporting.modes import mode_table
from finetune_assets.reporting.numbers import in_order, of_evaluation
from finetune_assets.reporting.wandb_champion import log_champion
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.results import Results

CATEGORIES = 100
"""Maximum number of categories whose losses are shown."""
DIGITS = 8
"""Significant digits of a metric in the metadata."""
GATE = "gate"
"""Name of the check that reports a promotion."""


def evaluate(
    context: dg.AssetExecutionContext,
    project: Project,
    launcher: Launcher,
    lineage: Lineage,
    adapter: ArtifactRef,
    dataset: ArtifactRef,
    base_model: ArtifactRef,
) -> Outcome:
    """Evaluate an adapter against its base model and the current champion, or reuse a stored evaluation."""
    against = lineage.opponent(adapter)
    champion = lineage.champions.adapter(against) if against else None
    imported = lineage.import_external_inputs(tokenized_dataset=dataset, cached_base_model=base_model)
    text, tasks = imported.get("general_text"), imported.get("tasks")
    fingerprint, index = lineage.fingerprint(EVALUATIONS, lora_adapter=adapter), lineage.index()

    def make() -> ArtifactRef:
        unseen = lineage.held_back(adapter, *([champion] if champion else []))
        some_were_seen = unseen != lineage.held_back()
        inputs = {"base-model": base_model, "dataset": dataset, "adapter": adapter}
        if text:
            inputs["general-text"] = text
        if tasks:
            inputs["tasks"] = tasks
        if index:
            inputs["index"] = index
        if champion or some_were_seen or index:
            sources = lineage.selected_sources().values()
            inputs |= {f"raw-{index}": ref for index, ref in enumerate(sources)}
        if champion:
            inputs["champion"] = champion
            other = base_of(lineage, champion)
            if other and other != base_model:
                inputs["champion-base-model"] = other
        spec = job(
            project,
            lineage.experiment,
            module="finetune_assets.evaluation",
            inputs=inputs,
            kind=EVALUATIONS.folder,
            fingerprint=fingerprint,
            made_from={
                "fingerprint": fingerprint,
                "experiment": lineage.experiment.name,
                "lora_adapter": adapter.fingerprint,
                "champion": champion.fingerprint if champion else None,
                "general_text": text.fingerprint if text else None,
                "tasks": tasks.fingerprint if tasks else None,
                "split": lineage.split,
                **(_retrieval(lineage, dataset, index) if index else {}),
                HELD_BACK: asdict(unseen) if some_were_seen else None,
            },
        )
        return run_in_pipes(context, launcher, spec)

    return materialize_or_reuse(context, project, EVALUATIONS, fingerprint, make, called="adapter_evaluation")


def _retrieval(lineage: Lineage, dataset: ArtifactRef, index: ArtifactRef) -> dict[str, Any]:
    """What an evaluation with retrieval is made from, besides."""
    salt = lineage.raw.config.split_salt
    return {"retrieval_index": index.fingerprint, "tokenized_dataset": dataset.fingerprint, "split_salt": salt}


def base_of(lineage: Lineage, adapter: ArtifactRef) -> ArtifactRef | None:
    """The base model that an adapter was trained on, if it is still in the store."""
    manifest = lineage.store.manifest(adapter.kind, adapter.name)
    recorded = RecordedBase.of(manifest.made_from if manifest else {})
    if recorded.repo is None or recorded.revision is None:
        return None
    return lineage.find_base_model(f"{recorded.repo}/{recorded.revision}")


def evaluation_metadata(evaluation: Mapping[str, Any], drawn: Results) -> dict[str, Any]:
    """Metadata of an evaluation: scalars, losses by category, and answers side by side."""
    from finetune_assets.data.tables import rows_table

    names = in_order(evaluation["contenders"])

    def losses_by(column: str, groups: list[dict[str, Any]]) -> dg.MarkdownMetadataValue:
        shown = [
            {**row, **{name: "" if row[name] is None else f"{row[name]:.4f}" for name in names}}
            for row in groups[:CATEGORIES]
        ]
        return dg.MetadataValue.md(rows_table(shown, [column, "rows", *names]))

    sources, modes = evaluation.get("sources"), evaluation.get("modes")
    samples = [{**row, **{name: row[name] or "" for name in names}} for row in evaluation["samples"]]
    return {
        **{name: float(f"{value:.{DIGITS}g}") for name, value in of_evaluation(evaluation).items()},
        "split": evaluation["split"],
        "rows": evaluation["rows"],
        "generated_rows": evaluation["generated_rows"],
        **pictures(evaluation, drawn),
        "loss_by_category": losses_by("category", evaluation["categories"]),
        **({"loss_by_source": losses_by("source", sources)} if sources else {}),
        **(_mode_tables(evaluation) if modes else {}),
        "samples": dg.MetadataValue.md(rows_table(samples, ["prompt", "expected", *names])),
    }


def _mode_tables(evaluation: Mapping[str, Any]) -> dict[str, dg.MarkdownMetadataValue]:
    """All metrics in all modes: of all rows, and of those with unseen passages."""
    from finetune_assets.data.tables import rows_table

    return {
        name: dg.MetadataValue.md(rows_table(*mode_table(evaluation[name]))) for name in ("modes", "unseen_passages")
    }


@dataclass(frozen=True)
class Decision:
    """The result of a promotion.

    Attributes:
        promoted: Whether this decision promoted the challenger.
        reason: Reason of the decision, with the deciding number.
        numbers: Values that the gate compared, and its thresholds.
        champion: The champion after the decision; None if the experiment has no champion.
        is_champion: Whether the challenger is the champion after the decision.
    """

    promoted: bool
    reason: str
    numbers: Mapping[str, Any]
    champion: ArtifactRef | None
    is_champion: bool

    @property
    def check_result(self) -> dg.AssetCheckResult:
        """Result of the gate check: passes if the challenger is the champion, and warns otherwise."""
        flat = {name: value for name, value in self.numbers.items() if isinstance(value, int | float)}
        return dg.AssetCheckResult(
            passed=self.is_champion,
            check_name=GATE,
            severity=dg.AssetCheckSeverity.WARN,
            description=self.reason,
            metadata={**flat, "thresholds": dg.MetadataValue.json(self.numbers.get("thresholds", {}))},
        )


def promote_if_better(lineage: Lineage, challenger: ArtifactRef, evaluation: ArtifactRef, by: str) -> Decision:
    """Promote a challenger if its evaluation passes the gate, and keep the champion otherwise.

    Args:
        lineage: Lineage of the experiment.
        challenger: The adapter to promote.
        evaluation: Evaluation of the challenger against the base model and the champion.
        by: Author of the promotion, recorded in the history.

    Returns:
        The decision, with its reason and the numbers that the gate compared.
    """
    from finetune_assets.evaluation.files import (
        forgetting_of,
        gain_of,
        loss_increases,
        preference_gain_of,
        read_evaluation,
    )
    from finetune_assets.evaluation.gate import judge

    champions, experiment = lineage.champions, lineage.experiment
    current = champions.current()
    champion = champions.adapter(current) if current else None
    folder = lineage.store.fetch(evaluation)
    gate, mode = experiment.config.gate, gate_mode(experiment.config)
    gain, opponent = gain_of(folder, gate.confidence, mode)
    increases = loss_increases(folder, gate.max_loss_of)
    forgetting = forgetting_of(read_evaluation(folder))
    learns_preferences = experiment.config.training.objective != "sft" and experiment.config.stack is None
    preferences = preference_gain_of(folder, gate.confidence) if learns_preferences else None
    verdict = judge(gain, forgetting, gate, f"the {opponent}", mode, increases, preferences)
    if current and current.adapter == challenger.fingerprint:
        reason = f"{name(challenger)} is already the champion (record {current.number})"
        return Decision(False, reason, verdict.numbers, champion, is_champion=True)
    if why := _manual_promotion_reason(lineage, challenger):
        reason = f"{name(challenger)} requires manual promotion: {why}"
        return Decision(False, reason, verdict.numbers, champion, is_champion=False)
    if not verdict.promote:
        reason = f"{name(challenger)} not promoted: {verdict.reason}"
        return Decision(False, reason, verdict.numbers, champion, is_champion=False)
    record = champions.promote(
        Record(
            experiment.name,
            challenger.fingerprint,
            PROMOTED,
            challenger.kind,
            current.adapter if current else None,
            evaluation.fingerprint,
            dict(verdict.numbers),
            verdict.reason,
            by,
        ),
        after=current.number if current else 0,
    )
    reason = f"{name(challenger)} promoted (record {record.number}): {verdict.reason}"
    return Decision(True, reason, verdict.numbers, challenger, is_champion=True)


def _manual_promotion_reason(lineage: Lineage, challenger: ArtifactRef) -> str:
    """Reason why the challenger requires manual promotion; empty if automatic promotion is allowed."""
    experiment = lineage.experiment
    command = f'finetune adapter promote {experiment.name} {name(challenger)} --reason "..."'
    if foreign := _foreign_sources(lineage, challenger):
        return f"{foreign}; to promote it anyway, use `{command}`"
    if experiment.overrides:
        return f"it was trained with per-run overrides ({', '.join(experiment.overrides)}); use `{command}`"
    if experiment.sweep:
        return f"it belongs to the sweep {experiment.sweep}; copy its settings to an experiment file first"
    if withdrawn := lineage.champions.withdrawn().get(challenger.fingerprint):
        return f"it was rolled back on {withdrawn.at} ({withdrawn.reason}); use `{command}`"
    return ""


def _foreign_sources(lineage: Lineage, challenger: ArtifactRef) -> str:
    """How the challenger's raw data differs from the champion's if they share no source, otherwise empty.

    The gate rows are the challenger's: on them, an adapter of other data wins without being better at the champion's
    task.
    """
    champion = lineage.champions.champion()
    if champion is None:
        return ""
    ours, theirs = lineage.sources_of(challenger), lineage.sources_of(champion)
    if not ours or not theirs or ours & theirs:
        return ""
    return f"it is trained on {', '.join(sorted(ours))}, the champion on {', '.join(sorted(theirs))}"


def wandb_metadata(context: dg.AssetExecutionContext, lineage: Lineage, decision: Decision) -> dict[str, Any]:
    """Log a new champion to Weights & Biases if the experiment does so; where it is found."""
    record = lineage.champions.current()
    if not decision.promoted or record is None:
        return {}
    link = log_champion(lineage.experiment.config.wandb, record, lineage.store, context.log.info)
    return {"wandb_champion": dg.MetadataValue.text(link.get("artifact") or link["sync"])} if link else {}


def name(adapter: ArtifactRef) -> str:
    return adapter.fingerprint[:12]
