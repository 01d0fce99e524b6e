"""The adapter of the lowest held-out loss is published, and training stops when the loss no longer falls."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw import ingest
from tiers import tiered
from training.conftest import BASE, FinishedRun, configured
from training.measuring import Killed, die_at, names
from training.test_contract import VARIANTS

from finetune_assets.artifacts.history import predicted
from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.schema import Training
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.preflight.case import Shape
from finetune_assets.preflight.plan import make_plan
from finetune_assets.preflight.work import work_of
from finetune_assets.reporting.numbers import of_training, with_cost
from finetune_assets.sources.local import SAMPLE
from finetune_assets.training.best_step import EVALUATION_SHARE, FORWARD_SHARE, BestStep, Selection
from finetune_assets.training.order import Examples
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import Step

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


def state_of(run: LoraFinetune) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run.job.output / "trainer_state.json").read_text())
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


@pytest.mark.soak
@pytest.mark.system
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


def spoil_after(run: LoraFinetune, step: int) -> None:
    """Add noise to the trained weights in the step after `step`, so that later measurements are worse on any CPU."""
    train_step: Callable[[int, Any], Step] = run.train_step

    def spoiling(at: int, work: Any) -> Step:
        done = train_step(at, work)
        if at == step:
            with torch.no_grad():
                for weight in run.parameters:
                    weight.add_(torch.randn_like(weight))
        return done

    run.train_step = spoiling  # type: ignore[method-assign]


@pytest.mark.parametrize("kill", tiered([(-1, 1), (0, 1), (1, 3), (3, 3)], {(1, 3)}, {(-1, 1)}))
def test_a_resumed_training_keeps_best_step_and_patience(
    trained: Trained, finetune: Finetune, kill: tuple[int, int]
) -> None:
    """Killed some steps after the best one, with checkpoints after every step or every third one."""
    after, every = kill
    overrides = (*OVERFITTED, "training.patience=3")
    undisturbed = trained(*overrides).run
    assert undisturbed.log.best
    killed_at = undisturbed.log.best["step"] + after
    assert every <= killed_at < undisturbed.log.step, "after the first checkpoint, before the stop"
    overrides = (*overrides, f"training.save_steps={every}")
    victim = finetune(*overrides, name="killed")
    die_at(victim, killed_at)
    with pytest.raises(Killed):
        victim.run()
    resumed = finetune(*overrides, name="killed")
    taken = die_at(resumed, -1)
    resumed.run()
    assert taken == [*range(killed_at // every * every, undisturbed.log.step)]
    assert adapter_of(resumed) == adapter_of(undisturbed)
    assert resumed.log.best == undisturbed.log.best
    assert held_out(resumed) == held_out(undisturbed)


@pytest.mark.system
def test_a_training_killed_after_its_stop_is_not_continued(finetune: Finetune) -> None:
    overrides = (*OVERFITTED, "training.patience=1", "training.save_steps=1")
    stopped = finetune(*overrides)
    stopped.run()
    assert stopped.log.best
    assert stopped.log.best["saved_steps"] > 0
    again = finetune(*overrides)
    taken = die_at(again, -1)
    again.run()
    assert taken == []
    assert (again.log.best, held_out(again)) == (stopped.log.best, held_out(stopped))
    assert again.held_out_loss() == stopped.held_out_loss() == stopped.log.best["held_out_loss"]


@pytest.mark.system
@pytest.mark.parametrize("name", tiered(VARIANTS, system=("tokens", "dora", "nf4, tokens")))
def test_every_kind_of_adapter_is_restored(finetune: Finetune, base_model: Callable[[str], Path], name: str) -> None:
    """Also those with trained rows of the embedding, magnitudes of DoRA, or a quantized base."""
    variant = VARIANTS[name]
    run = finetune(*OVERFITTED, "training.learning_rate=0.05", *variant.settings, base=base_model(variant.base))
    spoil_after(run, 12)
    run.run()
    losses = held_out(run)
    assert run.log.best
    assert run.log.best["step"] <= 12 < run.log.step == 16
    assert run.held_out_loss() == min(losses.values()) == losses[run.log.best["step"]]


@pytest.mark.system
def test_the_gates_rows_have_no_part_in_it(trained: Trained, finetune: Finetune, tmp_path: Path) -> None:
    whole = trained(*OVERFITTED).run
    without = finetune(*OVERFITTED)
    folder = tmp_path / "without the gate's rows"
    shutil.copytree(whole.job.dataset, folder)
    (folder / "gate.arrow").unlink()
    run = LoraFinetune(replace(without.job, dataset=folder), without.config, without.process, without.reporter)
    run.run()
    assert adapter_of(run) == adapter_of(whole)
    assert run.log.best == whole.log.best


class Recorded:
    """A tracker that keeps the summary."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def summarize(self, numbers: dict[str, Any]) -> None:
        self.summary = numbers

    def link(self) -> dict[str, str]:
        return {}

    def ignore(self, *_: object) -> None:
        """Everything else that a tracker receives."""

    watch = record = log_adapter = finish = ignore


@pytest.mark.parametrize("keep", ["best", "last"])
def test_step_and_savings_are_named(finetune: Finetune, keep: str) -> None:
    """In the log, the card, the tracker's summary and the numbers of metadata and report, with the same values."""
    run = finetune(*OVERFITTED, "training.patience=2", f"training.keep={keep}", "hardware.price_per_hour=7200")
    printed: list[str] = []
    tracker = Recorded()
    run.reporter = Reporter(printed.append, {"recorded": tracker})
    run.run()
    state = state_of(run)
    best = run.log.best
    assert best
    step, saved = best["step"] if keep == "best" else run.log.step, 16 - run.log.step
    assert saved > 0
    hours = (state["seconds"] + state["evaluation_seconds"]) / run.log.step * saved / 3600
    expected = {"published_step": step, "saved_steps": saved, "saved_device_hours": hours, "saved_cost": 7200 * hours}
    assert {name: tracker.summary[name] for name in expected} == pytest.approx(expected)
    numbers = with_cost(of_training(state), 7200)
    assert (numbers["published_step"], numbers["saved_steps"]) == (step, saved)
    assert numbers["saved_device_hours"] == pytest.approx(hours, abs=1e-4)
    assert numbers["saved_cost"] == pytest.approx(7200 * numbers["saved_device_hours"])
    assert numbers["device_hours"] == pytest.approx(hours / saved * run.log.step, abs=1e-4)
    assert numbers["evaluation_time_share"] == pytest.approx(state["evaluation_seconds"] / state["seconds"], abs=1e-4)
    (line,) = [line for line in printed if line.startswith("Publishing")]
    (row,) = [row for row in (run.job.output / "README.md").read_text().splitlines() if "published step" in row]
    for text in (line, row):
        assert names(text, step, 16, saved, f"{hours:,.3g}", f"{7200 * hours:,.3g}")


@pytest.mark.soak
@pytest.mark.system
def test_only_measurements_between_the_steps_count_as_their_time(trained: Trained) -> None:
    """Those before the first and after the last step are made without these settings as well."""
    measured = trained(*OVERFITTED, "training.keep=last").run
    assert state_of(measured)["evaluation_seconds"] > 0
    last = trained(*OVERFITTED, "training.eval_steps=16").run
    assert held_out(last).keys() == {16}
    assert state_of(last)["evaluation_seconds"] == 0
    assert "evaluation_time_share" not in of_training(state_of(last))


@pytest.mark.soak
def test_auto_takes_at_most_its_share_of_the_measured_time(trained: Trained) -> None:
    """On a machine that nothing else keeps busy; `test_auto_takes_at_most_its_share` states what is planned."""
    run = trained(*OVERFITTED, "training.max_steps=80", "training.eval_steps=auto", "training.save_steps=null").run
    assert len(held_out(run)) > 2
    assert 0 < of_training(state_of(run))["evaluation_time_share"] <= EVALUATION_SHARE


@pytest.mark.system
def test_the_plan_counts_measurements_and_the_earliest_stop(trained: Trained) -> None:
    run = trained(*OVERFITTED).run
    settings = (*OVERFITTED, "training.patience=2", "hardware.price_per_hour=3")
    work = work_of(run.job.dataset, configured(*settings), 1)
    share = FORWARD_SHARE * 7 * int(run.val.lengths.sum()) / work.tokens
    assert (work.steps, work.evaluations, work.fewest_steps) == (16, 7, 6)
    assert work.evaluation_share == pytest.approx(share)
    without = work_of(run.job.dataset, configured(*settings, "training.eval_steps=null", "training.patience=null"), 1)
    assert (without.evaluations, without.evaluation_share, without.fewest_steps) == (0, 0, 16)

    shape, states = Shape.read(BASE, False), [state_of(run)]
    plan = make_plan(shape, configured(*settings), run.job.dataset, states)
    plain = make_plan(shape, configured(*OVERFITTED, "training.eval_steps=null"), run.job.dataset, states)
    assert plan.hours
    assert plain.hours
    assert plan.hours / plain.hours == pytest.approx(1 + share)
    assert plan.cost == pytest.approx(3 * plan.hours)
    assert plan.to_dict()["evaluations"] == {"count": 7, "time_share": work.evaluation_share, "fewest_steps": 6}
    assert predicted(plan.to_dict())["evaluation_time_share"] == pytest.approx(share, abs=1e-4)


def rows_split(folder: Path, tokenizer: Any, train: int) -> Path:
    """A dataset of so many training rows, and about as many for validation."""
    raw = ingest(folder / "raw", SAMPLE)
    for samples in range(train, 4 * train):
        data = configured(f"data.num_samples={samples}", "data.val_fraction=0.5", "data.gate_fraction=0.0").data
        out = folder / str(samples)
        out.mkdir()
        prepare_dataset(raw, tokenizer, data, "salt", out)
        if len(Examples.read(out / "train.arrow")) == train:
            return out
    raise AssertionError(f"no split has {train} training rows")


@pytest.mark.soak
@pytest.mark.system
def test_ten_rows_trained_too_long(finetune: Finetune, tmp_path: Path) -> None:
    """A user's settings against all 100 steps, each of them measured."""
    folder = rows_split(tmp_path / "ten", load_tokenizer(str(BASE)), 10)

    def train(name: str, *overrides: str) -> LoraFinetune:
        steps = ("training.max_steps=100", "training.logging_steps=100", "training.macro_batch_size=10")
        ready = finetune(*steps, "training.save_steps=null", *overrides, name=name)
        job = replace(ready.job, dataset=folder)
        run = LoraFinetune(job, ready.config, ready.process, ready.reporter)
        run.run()
        return run

    every = held_out(train("every step", "training.eval_steps=1", "training.keep=last"))
    assert every.keys() == {*range(1, 100)}
    lowest = min(every.values())
    assert every[99] > 1.1 * lowest, "the training is meant to overfit"
    run = train("best", "training.eval_steps=2", "training.patience=4")
    assert run.log.best
    best, saved = run.log.best["step"], run.log.best["saved_steps"]
    assert best < run.log.step < 100
    assert run.held_out_loss() == every[best] <= 1.01 * lowest
    assert saved == 100 - run.log.step >= 50


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
@pytest.mark.parametrize("sequences", [10, 640], ids=["less than a global batch", "ten global batches"])
def test_auto_takes_at_most_its_share(tokens: int, per_step: float, sequences: int) -> None:
    lengths = np.full(sequences, per_step / min(sequences, 64))
    selection = Selection.of(Training(eval_steps="auto", macro_batch_size=64), tokens, lengths)
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
    return ADAPTERS.fingerprint(
        configured(*overrides), tokenized_dataset="t", cached_base_model="b", warm_start=None, reference=None
    )


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
