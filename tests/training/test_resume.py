"""Trainings in real processes that are killed and resumed: the adapter is, to the bit, that of one left in peace.

A victim is launched by a process of its own, which is killed with all that it started; a training that runs to its end
is launched from here.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import JOB, RANK, family, runs
from safetensors.torch import load
from training.conftest import BASE, MADE_FROM, configured

from finetune_assets.config.loading import dump
from finetune_assets.launch.local import LocalEngine
from finetune_assets.store.artifacts import CHECKPOINTS, MANIFEST, ArtifactStore, open_store
from finetune_assets.worker.job import JobSpec

SOAK = bool(os.environ.get("SOAK"))
KILLS, TERMS, STEPS = {1: 20, 2: 20}, {1: 5, 2: 5}, 12
"""Kills and SIGTERMs by the number of ranks."""
LAUNCH = """
import sys
from pathlib import Path
from finetune_assets.worker.job import from_json
from finetune_assets.launch.local import LocalEngine
LocalEngine().run(from_json(Path(sys.argv[1]).read_text()), {})
"""
SETTINGS = (
    f"training.max_steps={STEPS}",
    "training.macro_batch_size=4",
    "training.micro_batch_size=1",
    "training.logging_steps=1",
    "training.save_steps=3",
    "lora.dropout=0.1",
)


@dataclass
class Machine:
    """A node: what is cached and half-done on it is gone with it."""

    store: ArtifactStore
    spec: JobSpec
    folder: Path

    @property
    def scratch(self) -> Path:
        return Path(self.spec.cache) / "scratch" / self.spec.fingerprint

    def start(self, **variables: str) -> subprocess.Popen[str]:
        """Launch the training from a process of its own."""
        job = self.folder / "job.json"
        job.write_text(self.spec.to_json())
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        command = [sys.executable, "-c", LAUNCH, str(job)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self) -> None:
        """Run to the end."""
        LocalEngine().run(self.spec, {"OMP_NUM_THREADS": "1"})

    def lose(self) -> None:
        """Take the machine away, with its cache and its checkpoints."""
        shutil.rmtree(self.spec.cache)

    def published(self, name: str) -> bytes:
        """A file of the adapter."""
        ref = self.store.resolve(self.spec.kind, self.spec.fingerprint, "lora_adapter")
        return (self.store.fetch(ref) / name).read_bytes()

    def adapter(self) -> bytes:
        return self.published("adapter_model.safetensors")

    def trainer_state(self) -> dict[str, Any]:
        return dict(json.loads(self.published("trainer_state.json")))

    def weights_mib(self) -> float:
        """What each process kept of the weights, the adapter's among them."""
        return float(self.trainer_state()["active"]["weights_mib"])

    def stored_checkpoints(self) -> list[str]:
        """Keys of everything that the store keeps of this training's checkpoints."""
        prefix = self.store.prefix(CHECKPOINTS, self.spec.fingerprint)
        return [stored.key for stored in self.store.objects.listing(prefix)]

    def newest_checkpoint(self) -> dict[str, Any]:
        """The log of the newest checkpoint on this machine or in the store, from which a training resumes."""
        logs = [json.loads((folder / "trainer_state.json").read_text()) for folder in self.scratch.glob("step-*")]
        for key in self.stored_checkpoints():
            *_, attempt, step, file = key.split("/")
            if file == MANIFEST:
                name = f"{self.spec.fingerprint}/{attempt}/{step}"
                folder = self.store.fetch(self.store.resolve(CHECKPOINTS, name, "lora_adapter"))
                logs.append(json.loads((folder / "trainer_state.json").read_text()))
        return max(logs, key=lambda log: int(log["step"]), default={"step": 0, "history": []})

    def resumed_from(self, checkpoint: dict[str, Any]) -> bool:
        """Whether a checkpoint was used: the speeds that were measured before it are in the adapter's record."""
        return bool(self.trainer_state()["history"][: checkpoint["step"]] == checkpoint["history"])


@pytest.fixture
def machine(dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., Machine]:
    """Makes machines; those of one `name` share a store."""

    def make(name: str, processes: int, cache: str = "cache", *more: str) -> Machine:
        config = configured(*SETTINGS, *more)
        folder = tmp_path / name
        store = open_store(f"file://{folder}/store", "me", folder / cache)
        base = store.publish(BASE, "base-models", "demo/1", "demo/1", {})
        rows = store.publish(dataset(config.data.tokenization), "tokenized", "d", "d", {})
        spec = JobSpec(
            module="finetune_assets.training",
            config=dump(config),
            inputs={"base-model": base, "dataset": rows},
            kind="adapters",
            fingerprint="a" * 64,
            made_from={**MADE_FROM, "fingerprint": "a" * 64},
            store=store.url,
            namespace="me",
            cache=str(folder / cache),
            processes=str(processes),
            scratch=True,
        )
        return Machine(store, spec, folder)

    return make


ADAPTERS: dict[int, bytes] = {}


@pytest.fixture
def undisturbed(machine: Callable[..., Machine]) -> Callable[[int], bytes]:
    """The adapter of so many ranks that nobody disturbed; made once."""

    def make(ranks: int) -> bytes:
        if ranks not in ADAPTERS:
            one = machine("undisturbed", ranks)
            one.run()
            ADAPTERS[ranks] = one.adapter()
        return ADAPTERS[ranks]

    return make


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    assert process.stderr
    raise AssertionError(f"step {step} never came: {process.stderr.read()[-2000:]}")


def members(process: subprocess.Popen[str], part: str) -> list[int]:
    """The processes that are a part of the training that a process has launched."""
    return [one.pid for one in family(process.pid).values() if one.part == part]


def ended(everyone: Iterable[int], seconds: float = 10) -> bool:
    """Whether no process of these is left, within some seconds."""
    until = time.monotonic() + seconds
    while alive := [pid for pid in everyone if runs(pid)]:
        if time.monotonic() > until:
            return not alive
        time.sleep(0.05)
    return True


def assert_nothing_left(machine: Machine) -> None:
    """No checkpoint outlives the training that it was for."""
    assert not machine.stored_checkpoints()
    assert not machine.scratch.exists()


def test_rank_that_is_killed_ends_all_and_another_machine_ends_bit_equal(
    machine: Callable[..., Machine], undisturbed: Callable[[int], bytes]
) -> None:
    first = machine("victim", 2)
    process = first.start()
    wait_for_step(process, 7)
    everyone = family(process.pid)
    os.kill(members(process, RANK)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "SIGKILL" in err
    assert ended(everyone)
    first.lose()
    second = machine("victim", 2, "elsewhere")
    newest = second.newest_checkpoint()
    assert newest["step"] >= 3
    second.run()
    assert second.resumed_from(newest)
    assert second.adapter() == undisturbed(2)
    assert_nothing_left(second)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", KILLS)
def test_killed_training_ends_bit_equal(
    machine: Callable[..., Machine], undisturbed: Callable[[int], bytes], ranks: int
) -> None:
    """Killed at a seeded step, whichever process it is; every other time the machine is lost with it."""
    expected = undisturbed(ranks)
    random_ = random.Random(ranks)
    for kill in range(KILLS[ranks]):
        victim = machine(f"victim-{kill}", ranks)
        process = victim.start()
        step = random_.randint(1, STEPS - 1)
        wait_for_step(process, step)
        everyone = family(process.pid)
        rank = random_.choice((False, True)) and kill % 3 != 0
        os.kill(members(process, RANK)[-1] if rank else process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
        assert ended(everyone)
        again = victim
        if kill % 2:
            victim.lose()
            again = machine(f"victim-{kill}", ranks, "elsewhere")
        newest = again.newest_checkpoint()
        kept = (step - 1) // 3 * 3  # of a step that was just reported the checkpoint may not be written
        if not kill % 2:
            assert kept <= newest["step"] <= kept + 6
        again.run()
        assert again.resumed_from(newest)
        assert again.adapter() == expected, f"kill {kill} at step {step}"
        assert_nothing_left(again)


@pytest.mark.soak
@pytest.mark.system
@pytest.mark.parametrize("ranks", TERMS)
def test_terminated_training_keeps_its_last_step(
    machine: Callable[..., Machine], undisturbed: Callable[[int], bytes], ranks: int
) -> None:
    """SIGTERM, as a scheduler sends it before it takes a machine away: another one resumes from that very step."""
    for term in range(TERMS[ranks]):
        victim = machine(f"victim-{term}", ranks)
        process = victim.start()
        step = random.Random(term).randint(4, STEPS - 3)
        wait_for_step(process, step)
        (job,) = members(process, JOB)
        os.kill(job, signal.SIGTERM)
        process.communicate(timeout=120)
        assert process.returncode != 0
        victim.lose()
        again = machine(f"victim-{term}", ranks, "elsewhere")
        kept = again.newest_checkpoint()
        assert kept["step"] >= step
        again.run()
        assert again.resumed_from(kept)
        assert again.adapter() == undisturbed(ranks)


@pytest.mark.soak
def test_trained_again_from_the_start_on_request(machine: Callable[..., Machine]) -> None:
    one = machine("one", 1)
    process = one.start()
    wait_for_step(process, 7)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    kept = one.newest_checkpoint()
    assert kept["step"] >= 3
    one.spec = replace(one.spec, ignore_checkpoints=True)
    one.run()
    assert not one.resumed_from(kept)


@pytest.mark.system
@pytest.mark.parametrize("quantization", ["none", "nf4"] if SOAK else ["nf4"])
def test_sharded_base_trains_the_same_adapter(machine: Callable[..., Machine], quantization: str) -> None:
    """Each of two processes keeps half of the base; one has more micro-batches than the other."""
    same = ("training.max_steps=6", f"model.quantization={quantization}")
    same = (*same, "training.macro_batch_size=3", "lora.dropout=0")
    whole, sharded = (
        machine(sharding, 2, "cache", *same, f"training.sharding={sharding}") for sharding in ("none", "fsdp")
    )
    whole.run()
    sharded.run()
    assert [one.trainer_state()["active"]["sharding"] for one in (whole, sharded)] == ["none", "fsdp"]
    ours, theirs = (load(one.adapter()) for one in (sharded, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    adapter = len(sharded.adapter()) / 2**20
    assert sharded.weights_mib() - adapter < 0.6 * (whole.weights_mib() - adapter)
