"""The adapter of the lowest held-out loss is published, and training stops when the loss no longer falls."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiers import tiered
from training.conftest import FinishedRun, configured
from training.measuring import die_at

from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.schema import Training
from finetune_assets.training.best_step import EVALUATION_SHARE, FORWARD_SHARE, BestStep, Selection
from finetune_assets.training.recipe import LoraFinetune

Finetune = Callable[..., LoraFinetune]
Trained = Callable[..., FinishedRun]
OVERFITTED = (
    "training.max_steps=16",
    "training.learning_rate=1e-2",
    "training.lr_scheduler=constant",
    "training.warmup_steps=0",
    "training.macro_batch_size=4",
    "training.micro_batch_size=4",
    "training.eval_steps=2",
    "training.save_steps=3",
)
"""The held-out loss falls and rises again."""


def state_of(run: LoraFinetune) -> dict[str, object]:
    state: dict[str, object] = json.loads((run.job.output / "trainer_state.json").read_text())
    return state


def adapter_of(run: LoraFinetune) -> bytes:
    return (run.job.output / "adapter_model.safetensors").read_bytes()


def held_out(run: LoraFinetune) -> dict[int, float]:
    return {entry["step"]: entry["held_out_loss"] for entry in run.log.history if "held_out_loss" in entry}


def test_the_published_adapter_is_that_of_the_lowest_held_out_loss(trained: Trained, finetune: Finetune) -> None:
    run = trained(*OVERFITTED).run
    losses = held_out(run)
    best = min(losses, key=lambda step: losses[step])
    assert best < 16, "the training is meant to overfit"
    assert [*losses] == [*range(2, 17, 2)]
    assert run.log.best == vars(BestStep(best, losses[best], losses[best], (16 - best) // 2))
    assert run.log.held_out_loss["after"] == losses[best]
    assert run.held_out_loss() == losses[best], "the weights are those that were measured"
    until_best = finetune(*OVERFITTED, f"training.max_steps={best}", "training.keep=last", name="until best")
    until_best.run()
    assert adapter_of(until_best) == adapter_of(run), "to the bit"
    card = (run.job.output / "README.md").read_text()
    assert f"| published step | {best} of 16 |" in card


def test_the_last_step_is_what_it_was(trained: Trained, finetune: Finetune) -> None:
    last = trained(*OVERFITTED, "training.keep=last").run
    without = finetune(*OVERFITTED, "training.eval_steps=null", name="without")
    without.run()
    assert adapter_of(last) == adapter_of(without)
    assert held_out(last).keys() == {*range(2, 16, 2)}
    assert last.log.held_out_loss["after"] == without.log.held_out_loss["after"]


def test_patience_saves_steps(trained: Trained, finetune: Finetune) -> None:
    whole = held_out(trained(*OVERFITTED).run)
    run = finetune(*OVERFITTED, "training.patience=2", name="patience")
    run.run()
    measured = held_out(run)
    assert measured == {step: whole[step] for step in measured}
    best = min(measured, key=lambda step: measured[step])
    assert [*measured][-2:] == [best + 2, best + 4]
    assert run.log.step == best + 4
    assert run.log.best
    assert run.log.best["saved_steps"] == 16 - run.log.step > 0
    assert run.held_out_loss() == measured[best]


@pytest.mark.parametrize("step", tiered([1, 4, 7], {4}))
def test_a_resumed_training_keeps_best_step_and_patience(
    finetune: Finetune, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before, at and after the best step."""
    overrides = (*OVERFITTED, "training.patience=3")
    undisturbed = finetune(*overrides, name="undisturbed")
    undisturbed.run()
    if step >= undisturbed.log.step:
        pytest.skip("stopped before")
    victim = finetune(*overrides, name="killed")
    die_at(victim, step)
    resumed = finetune(*overrides, name="killed")
    resumed.run()
    assert adapter_of(resumed) == adapter_of(undisturbed)
    assert resumed.log.best == undisturbed.log.best
    assert held_out(resumed) == held_out(undisturbed)


def test_evaluations_are_counted() -> None:
    selection = Selection(every=2, keeps_best=True, patience=2, min_improvement=0.1)
    best = None
    seen = []
    for step, loss in enumerate([3.0, 2.0, 1.95, 1.85, math.nan, 1.9, 1.8], 1):
        best = selection.counted(best, step, loss)
        seen.append((best.step, best.without_improvement, selection.stops(best)))
    assert seen[:4] == [(1, 0, False), (2, 0, False), (3, 1, False), (4, 0, False)]
    assert seen[4:] == [(4, 1, False), (4, 2, True), (7, 3, True)]


def test_a_first_loss_that_is_not_finite_is_replaced() -> None:
    selection = Selection(1, True, None, 0.0)
    first = selection.counted(None, 1, math.nan)
    assert selection.counted(first, 2, 5.0).step == 2


@pytest.mark.parametrize(("tokens", "per_step"), [(1_000, 5_000.0), (50_000, 2_000.0), (10, 100_000.0)])
def test_auto_takes_at_most_its_share(tokens: int, per_step: float) -> None:
    lengths = np.full(10, per_step / 64)  # macro_batch_size is 64
    selection = Selection.of(Training(eval_steps="auto"), tokens, lengths)
    assert selection.every
    cost = FORWARD_SHARE * tokens / per_step
    assert cost / selection.every <= EVALUATION_SHARE
    assert selection.every == 1 or cost / (selection.every - 1) > EVALUATION_SHARE


def test_without_validation_rows_nothing_is_evaluated() -> None:
    selection = Selection.of(Training(eval_steps=1), 0, np.array([10]))
    assert selection == Selection(None, False, None, 0.0)
    assert not selection.is_due(1, 1)


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["training.keep=best"], "training.keep"),
        (["training.patience=2"], "training.patience"),
        (["training.keep=best", "training.eval_steps=2", "data.val_fraction=0"], "training.keep"),
        (["training.eval_steps=often"], "training.eval_steps"),
        (["training.eval_steps=0"], "training.eval_steps"),
        (["training.eval_steps=1.5"], "training.eval_steps"),
        (["training.eval_steps=true"], "training.eval_steps"),
        (["training.eval_steps=2", "training.patience=0"], "training.patience"),
        (["training.min_improvement=-1"], "training.min_improvement"),
    ],
)
def test_impossible_settings_are_named(overrides: list[str], setting: str) -> None:
    with pytest.raises(ConfigError) as error:
        configured(*overrides)
    assert setting in str(error.value)


def identity(*overrides: str) -> str:
    return ADAPTERS.fingerprint(configured(*overrides), tokenized_dataset="t", cached_base_model="b", warm_start=None)


def test_a_fingerprint_moves_only_where_bytes_do() -> None:
    plain, every = identity(), "training.eval_steps=5"
    assert identity(every, "training.keep=last") == plain
    assert identity("training.keep=last") == plain
    best = identity(every)
    assert best not in (plain, identity("training.eval_steps=6"))
    assert identity(every, "training.keep=best") == best
    assert identity(every, "training.min_improvement=0.1") == best, "without patience it decides nothing"
    assert identity(every, "data.val_fraction=0") == identity("data.val_fraction=0")
    stopping = identity(every, "training.keep=last", "training.patience=2")
    assert stopping not in (plain, best)
    assert identity(every, "training.keep=last", "training.patience=2", "training.min_improvement=0.1") != stopping
