"""Whatever part of a training is killed, nothing is left of it, and the next run ends bit-equal."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from training.conftest import dataset
from training.test_resume import STEPS, Machine, machine, undisturbed, wait_for_step

from finetune_assets.launch.process import FORKSERVER

__all__ = ["dataset", "machine", "undisturbed"]
ROUNDS = 5 if os.environ.get("SOAK") else 1
RUN, SERVER, PARENT, JOB, AGENT, RANK = "run", "fork server", "its parent", "job", "agent", "rank"
COMMANDS = {
    SERVER: "finetune_assets/launch/forkserver.py",
    JOB: "finetune_assets.launch.bootstrap",
    AGENT: "torch.distributed.run",
    RANK: "finetune_assets.training",
}
"""What the command line of each has, in the order of looking."""
HOLDER = "import sys; from finetune_assets.launch import warm; print(warm.own().address, flush=True); sys.stdin.read()"


def alive(root: int) -> dict[int, str]:
    """Command lines of the processes that come of one, and its own."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family and pid not in family}:
        family |= more
    return {pid: commands[pid] for pid in family & parents.keys()}


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def part(family: dict[int, str], name: str) -> int:
    """The process that has a part in the training."""
    return next(
        pid
        for pid, command in family.items()
        if next((part for part, words in COMMANDS.items() if words in command), None) == name
    )


@contextmanager
def a_server_elsewhere() -> Iterator[tuple[int, dict[str, str]]]:
    """A fork server below a process that is not the run: that process, and the environment for runs to use it."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    try:
        yield holder.pid, {FORKSERVER: holder.stdout.readline().strip()}
    finally:
        holder.kill()
        holder.communicate()


def first_step(out: str) -> int:
    """The first step that was reported."""
    return int(next(re.finditer(r"^step (\d+)/", out, re.MULTILINE))[1])


@pytest.mark.parametrize(
    "victim", [RANK, SERVER, *(pytest.param(name, marks=pytest.mark.system) for name in (JOB, AGENT, RUN, PARENT))]
)
def test_nothing_is_left_and_the_next_run_ends_bit_equal(
    machine: Callable[..., Machine],
    undisturbed: Callable[[int], bytes],
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
) -> None:
    monkeypatch.delenv(FORKSERVER, raising=False)
    expected = undisturbed(2)
    draw = random.Random(victim)
    for number in range(ROUNDS):
        one = machine(f"{victim} {number}", 2)
        with a_server_elsewhere() as (holder, environment):
            process = one.start(**(environment if victim == PARENT else {}))
            step = draw.randint(5, STEPS - 2)
            wait_for_step(process, step)
            family = alive(process.pid) | (alive(holder) if victim == PARENT else {})
            pid = {RUN: process.pid, PARENT: holder}.get(victim) or part(family, victim)
            os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + 5
            while left := {pid: command for pid, command in family.items() if pid != process.pid and runs(pid)}:
                assert time.monotonic() < end, left
                time.sleep(0.05)
            process.communicate(timeout=60)
            assert process.returncode != 0
        again = one.run()
        assert 1 < first_step(again) <= step + 1, "it goes on from a checkpoint"
        assert one.adapter() == expected
        assert not one.scratch.exists()
