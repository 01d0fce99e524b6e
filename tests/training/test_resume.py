"""Trainings in real processes that are killed and go on: the adapter is, to the bit, that of one left in peace."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from training.conftest import MADE_FROM, configured

from finetune_assets.config.loading import dump
from finetune_assets.launch.job import JobSpec
from finetune_assets.store.artifacts import ArtifactStore, open_store
from finetune_assets.store.base_models import PACKAGED

SOAK = bool(os.environ.get("SOAK"))
KILLS, TERMS, STEPS = ({1: 20, 2: 20} if SOAK else {1: 1, 2: 1}), ({1: 5, 2: 5} if SOAK else {2: 1}), 12
"""Kills and SIGTERMs by the number of ranks."""
LAUNCH = """
import sys
from pathlib import Path
from finetune_assets.launch.job import from_json
from finetune_assets.launch.local import LocalLauncher
LocalLauncher().run(from_json(Path(sys.argv[1]).read_text()), {})
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

    def start(self) -> subprocess.Popen[str]:
        job = self.folder / "job.json"
        job.write_text(self.spec.to_json())
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", LAUNCH, str(job)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self) -> str:
        """Run to the end; what was said."""
        process = self.start()
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        return out

    def published(self, name: str) -> bytes:
        """A file of the adapter."""
        ref = self.store.resolve(self.spec.kind, self.spec.fingerprint, "lora_adapter")
        return (self.store.fetch(ref) / name).read_bytes()

    def adapter(self) -> bytes:
        return self.published("adapter_model.safetensors")

    def weights_mib(self) -> float:
        """What each process kept of the weights, the adapter's among them."""
        return json.loads(self.published("trainer_state.json"))["active"]["weights_mib"]


@pytest.fixture
def machine(dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., Machine]:
    """Makes machines; those of one `name` share a store."""

    def make(name: str, processes: int, cache: str = "cache", *more: str) -> Machine:
        config = configured(*SETTINGS, *more)
        folder = tmp_path / name
        store = open_store(f"file://{folder}/store", "me", folder / cache)
        base = store.publish(PACKAGED["demo-base"], "base-models", "demo/1", "demo/1", {})
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


def family(process: subprocess.Popen[str]) -> list[int]:
    """A process and all that come of it, from the launcher over the bootstrap and torchrun to the ranks."""
    found = [process.pid]
    for pid in found:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        found += [int(child) for child in children.read_text().split()] if children.exists() else []
    return found


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
        for pid in family(process)[:: random_.choice((1, -1))][:1] if kill % 3 else [process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=120)
        again = victim
        if kill % 2:
            shutil.rmtree(victim.spec.cache)
            again = machine(f"victim-{kill}", ranks, "elsewhere")
        said = again.run()
        begun = re.search(r"going on from the checkpoint of step (\d+)", said)
        kept = (step - 1) // 3 * 3  # of a step that was just told the checkpoint may not be written
        if not kill % 2 and kept:
            assert begun, said
            assert kept - 3 <= int(begun[1]) <= kept + 3
        assert again.adapter() == expected, f"kill {kill} at step {step}"
        assert not [key for key in (o.key for o in again.store.objects.listing()) if "/checkpoints/" in key]
        assert not victim.scratch.exists()


@pytest.mark.parametrize("ranks", TERMS)
def test_training_asked_to_end_keeps_its_last_step(
    machine: Callable[..., Machine], undisturbed: Callable[[int], bytes], ranks: int
) -> None:
    """SIGTERM, as a scheduler sends it before it takes a machine away: another one goes on from that very step."""
    for term in range(TERMS[ranks]):
        victim = machine(f"victim-{term}", ranks)
        process = victim.start()
        step = random.Random(term).randint(4, STEPS - 3)
        wait_for_step(process, step)
        os.kill(family(process)[1], signal.SIGTERM)  # the bootstrap, which a scheduler starts
        process.communicate(timeout=120)
        assert process.returncode != 0
        shutil.rmtree(victim.spec.cache)
        again = machine(f"victim-{term}", ranks, "elsewhere")
        said = again.run()
        begun = re.search(r"going on from the checkpoint of step (\d+)", said)
        assert begun, said
        assert int(begun[1]) >= step
        assert again.adapter() == undisturbed(ranks)


def test_rank_that_is_killed_brings_all_down_and_is_told(machine: Callable[..., Machine]) -> None:
    victim = machine("victim", 2)
    process = victim.start()
    wait_for_step(process, 2)
    everyone = family(process)
    os.kill(everyone[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in err
    assert not [pid for pid in everyone if Path(f"/proc/{pid}").exists()]


@pytest.mark.soak
def test_trained_again_from_the_start_if_asked(machine: Callable[..., Machine]) -> None:
    one = machine("one", 1)
    process = one.start()
    wait_for_step(process, 7)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    one.spec = replace(one.spec, afresh=True)
    assert "going on from" not in one.run()


@pytest.mark.parametrize("quantization", ["none", "nf4"] if SOAK else ["nf4"])
def test_sharded_base_trains_the_same_adapter(machine: Callable[..., Machine], quantization: str) -> None:
    """Each of two processes keeps half of the base; one has more micro-batches than the other."""
    same = (f"model.quantization={quantization}", "training.macro_batch_size=3", "lora.dropout=0")
    whole, sharded = (
        machine(sharding, 2, "cache", *same, f"training.sharding={sharding}") for sharding in ("none", "fsdp")
    )
    whole.run()
    assert "sharding fsdp" in sharded.run()
    ours, theirs = (load(one.adapter()) for one in (sharded, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    adapter = len(sharded.adapter()) / 2**20
    assert sharded.weights_mib() - adapter < 0.6 * (whole.weights_mib() - adapter)
