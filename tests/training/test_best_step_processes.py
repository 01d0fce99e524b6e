"""The best step in trainings of one and two ranks, undisturbed and killed, in real processes."""

import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import RANK, family
from safetensors.torch import load
from training.conftest import dataset
from training.test_resume import SOAK, Machine, assert_nothing_left, ended, machine, members, wait_for_step

__all__ = ["dataset", "machine"]
OVERFITTED = (
    "training.max_steps=20",
    "training.learning_rate=1e-2",
    "training.lr_scheduler=constant",
    "training.warmup_steps=0",
    "training.eval_steps=2",
    "training.patience=3",
    "training.keep=best",
)
"""Checkpoints after every third step."""
KILLS = 20 if SOAK else 1


def choice(state: dict[str, Any]) -> dict[str, Any]:
    """What a trainer state contains about the best step, with all measurements."""
    held_out = {entry["step"]: entry["held_out_loss"] for entry in state["history"] if "held_out_loss" in entry}
    return {"step": state["step"], "best": state["best"], "measured": held_out, "ends": state["held_out_loss"]}


@pytest.mark.system
def test_one_and_two_ranks_agree(machine: Callable[..., Machine]) -> None:
    one, two = (machine(f"ranks {ranks}", ranks, "cache", *OVERFITTED, "lora.dropout=0") for ranks in (1, 2))
    for each in (one, two):
        each.run()
    ours, theirs = choice(one.trainer_state()), choice(two.trainer_state())
    assert two.trainer_state()["active"]["processes"] == 2
    assert ours["step"] == theirs["step"] < 20
    for name in ("step", "without_improvement", "saved_steps"):
        assert ours["best"][name] == theirs["best"][name]
    assert ours["measured"] == pytest.approx(theirs["measured"], rel=1e-4)
    weights, others = load(one.adapter()), load(two.adapter())
    assert weights.keys() == others.keys()
    # Adam turns rounding differences of near-zero gradients into differences of about the learning rate
    difference = torch.cat([(weights[name] - others[name]).flatten() for name in weights])
    moved = torch.cat([value.flatten() for value in weights.values()])
    assert difference.norm() / moved.norm() < 1e-3


@pytest.mark.soak
@pytest.mark.system
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_training_ends_with_the_same_best_step(machine: Callable[..., Machine], ranks: int) -> None:
    """Killed at seeded steps until its early stop, whichever process it is; every other time on a lost machine."""
    undisturbed = machine("undisturbed", ranks, "cache", *OVERFITTED)
    undisturbed.run()
    adapter, expected = undisturbed.adapter(), choice(undisturbed.trainer_state())
    assert expected["best"]["step"] < expected["step"] < 20
    draw = random.Random(ranks)
    for kill in range(KILLS):
        name, step = f"victim {kill}", draw.randint(1, expected["step"] - 1)
        victim = machine(name, ranks, "cache", *OVERFITTED)
        process = victim.start()
        wait_for_step(process, step)
        everyone = family(process.pid)
        os.kill(draw.choice([process.pid, *members(process, RANK)]), signal.SIGKILL)
        process.communicate(timeout=120)
        assert ended(everyone)
        if kill % 2:
            victim.lose()
            victim = machine(name, ranks, "elsewhere", *OVERFITTED)
        newest = victim.newest_checkpoint()
        victim.run()
        assert victim.resumed_from(newest)
        assert victim.adapter() == adapter, f"kill {kill} at step {step}"
        assert choice(victim.trainer_state()) == expected, f"kill {kill} at step {step}"
        assert_nothing_left(victim)
