"""Whatever part of a training is killed, nothing is left of it, and the next run ends bit-equal."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
from processes import AGENT, JOB, RANK, SERVER, family
from training.conftest import dataset
from training.test_resume import STEPS, Machine, assert_nothing_left, ended, machine, undisturbed, wait_for_step

from finetune_assets.worker.process import FORKSERVER

__all__ = ["dataset", "machine", "undisturbed"]
ROUNDS = 5
RUN, PARENT = "run", "parent of the fork server"
NAMES = {"rank": RANK, "fork server": SERVER, "job": JOB, "agent": AGENT, RUN: "", PARENT: ""}
HOLDER = "import sys; from finetune_assets.worker import warm; print(warm.own().address, flush=True); sys.stdin.read()"


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


@pytest.mark.soak
@pytest.mark.system
@pytest.mark.parametrize(
    "victim",
    ["job", "rank", "fork server", "agent", RUN, PARENT],
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
        with a_server_elsewhere() if victim == PARENT else nullcontext((0, {})) as (holder, environment):
            process = one.start(**environment)
            step = draw.randint(5, STEPS - 2)
            wait_for_step(process, step)
            everyone = family(process.pid) | (family(holder) if holder else {})
            parts = {RUN: [process.pid], PARENT: [holder]}
            of_part = parts.get(victim) or [one.pid for one in everyone.values() if one.part == NAMES[victim]]
            assert len(of_part) == (2 if victim == "rank" else 1)
            os.kill(of_part[0], signal.SIGKILL)
            assert ended(everyone.keys() - {process.pid}, 5)
            process.communicate(timeout=60)
            assert process.returncode != 0
        newest = one.newest_checkpoint()
        assert newest["step"] >= 3
        one.run()
        assert one.resumed_from(newest)
        assert one.adapter() == expected
        assert_nothing_left(one)
