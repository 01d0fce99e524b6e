"""Validates the settings of retrieval: `data.retrieval`, and the modes of `evaluation` and `gate`."""

import math
from collections import Counter
from collections.abc import Iterator

from finetune_assets.config.errors import suggest
from finetune_assets.config.raw_validation import Problem
from finetune_assets.config.schema import Evaluation, ExperimentConfig, Gate, Retrieval

RETRIEVED = "retrieved"
"""The mode that serves."""
MODES = ("closed_book", "golden", "golden_and_distractors", RETRIEVED)
"""What an evaluation may give to the models with each question."""
MOST_PASSAGES = 100


def measured_modes(config: ExperimentConfig) -> tuple[str, ...]:
    """The modes of an experiment's evaluation, in the order of `MODES`; empty without retrieval."""
    if config.data.retrieval is None:
        return ()
    chosen = config.evaluation.modes
    return tuple(mode for mode in MODES if chosen is None or mode in chosen)


def gate_mode(config: ExperimentConfig) -> str | None:
    """The mode that the gate compares; None without retrieval."""
    return config.gate.mode or (RETRIEVED if config.data.retrieval else None)


def impossible_retrieval_settings(config: ExperimentConfig) -> Iterator[Problem]:
    """All problems of the settings of retrieval."""
    if config.data.retrieval is None:
        yield from _unused(config.evaluation, config.gate)
        return
    yield from _passages(config.data.retrieval)
    yield from _targets(config.data.retrieval)
    yield from _control(config.data.retrieval)
    if config.data.tokenization.train_on_inputs:
        yield (
            "data.tokenization.train_on_inputs",
            "cannot be used with data.retrieval: the model would learn the passages by heart, those of held-out rows "
            "too; use false",
        )
    yield from _modes(config.evaluation.modes)
    if not any(True for _ in _modes(config.evaluation.modes)):
        yield from _gate(config)


def _unused(evaluation: Evaluation, gate: Gate) -> Iterator[Problem]:
    given = {"evaluation.modes": evaluation.modes, "gate.mode": gate.mode, "gate.max_loss_of": gate.max_loss_of}
    for key, value in given.items():
        if value:
            yield key, "has no effect without data.retrieval; remove it, or set data.retrieval.documents"


def _passages(retrieval: Retrieval) -> Iterator[Problem]:
    if not 1 <= retrieval.passages <= MOST_PASSAGES:
        yield "data.retrieval.passages", f"{retrieval.passages} must be from 1 to {MOST_PASSAGES}"
    fewest = retrieval.fewest_passages
    if fewest is not None and not 1 <= fewest <= retrieval.passages:
        yield (
            "data.retrieval.fewest_passages",
            f"{fewest} must be from 1 to data.retrieval.passages, which is {retrieval.passages}",
        )
    share = retrieval.golden_share
    if not 0 <= share <= 1:
        yield "data.retrieval.golden_share", f"{share} must be a fraction from 0 to 1"
    elif share == 0 and (retrieval.cite or retrieval.without_golden == "refuse"):
        what = "cites its golden passage" if retrieval.cite else "is answered: all are refusals"
        yield "data.retrieval.golden_share", f"{share:g} leaves no training row that {what}; use more than 0"


def _control(retrieval: Retrieval) -> Iterator[Problem]:
    used = {"cite": retrieval.cite, "without_golden": retrieval.without_golden == "refuse"}
    for name, is_set in used.items():
        if retrieval.closed_book and is_set:
            yield f"data.retrieval.{name}", "cannot be learned with closed_book: true, which trains without passages"


def _targets(retrieval: Retrieval) -> Iterator[Problem]:
    if retrieval.without_golden == "refuse" and not retrieval.refusal.strip():
        example = "such as 'The documents do not answer this.'"
        yield "data.retrieval.refusal", f"must be set for without_golden: refuse, {example}"
    if retrieval.without_golden == "answer" and retrieval.refusal:
        yield (
            "data.retrieval.refusal",
            f"{retrieval.refusal!r} is not used by without_golden: answer; remove it, or use without_golden: refuse",
        )


def _modes(modes: list[str] | None) -> Iterator[Problem]:
    for mode, count in Counter(modes or ()).items():
        if mode not in MODES:
            yield "evaluation.modes", f"{mode!r} is not a mode; {suggest(mode, MODES)}"
        elif count > 1:
            yield "evaluation.modes", f"{mode} is listed twice; remove one"
    if modes is not None and RETRIEVED not in modes:
        yield "evaluation.modes", f"{modes} must contain {RETRIEVED}, the mode that serves; use null for all modes"


def _gate(config: ExperimentConfig) -> Iterator[Problem]:
    measured, judged = measured_modes(config), gate_mode(config)
    if judged not in measured:
        yield "gate.mode", f"{judged!r} is not in evaluation.modes; {suggest(str(judged), measured)}"
    for mode, most in config.gate.max_loss_of.items():
        key = f"gate.max_loss_of.{mode}"
        if mode not in measured:
            yield key, f"{mode!r} is not in evaluation.modes; {suggest(mode, measured)}"
        elif mode == judged:
            yield key, "is gate.mode, in which the loss must fall by gate.min_gain; remove it"
        elif not 0 <= most < math.inf:
            yield key, f"{most} must be finite and not negative"
