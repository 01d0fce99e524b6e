"""Weights & Biases by its real client: offline, on a server, and on one that goes away.

On every push a run is recorded offline and read back, and one is sent to a server; what servers do wrong is `system`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import wandb as wandb_server
from servers.wandb import KEY, Server
from training.conftest import ALONE, MADE_FROM, configured
from waiting import wait_for

from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import reporter
from finetune_assets.training.state import TrainingPaths
from finetune_assets.training.trackers import TrackedTraining
from finetune_assets.training.tracking import Begin, WandbRun, beginning, histogram

ID = MADE_FROM["fingerprint"][:32]
INPUTS = {"tokenized_dataset": "d" * 64, "cached_base_model": "b" * 64, "dolly_raw": "r" * 64}
SMALL = ("training.macro_batch_size=2", "training.micro_batch_size=2")
STEPS = ("training.max_steps=4", "training.logging_steps=1", *SMALL)


@pytest.fixture
def server() -> Iterator[Server]:
    with wandb_server.running() as running:
        yield running


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "HOME": tmp_path / "home",
        "WANDB_DIR": tmp_path,
        "WANDB_DATA_DIR": tmp_path / "wandb",
        "WANDB_API_KEY": KEY,
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        monkeypatch.setenv(name, str(value))


def begun(*overrides: str) -> Begin:
    begin = beginning(configured("wandb.project=p", *STEPS, *overrides), MADE_FROM | INPUTS, {})
    assert begin
    return begin


@pytest.fixture
def printed() -> list[str]:
    """Lines that a tracked run reported."""
    return []


@pytest.fixture
def track(printed: list[str]) -> Callable[..., dict[str, Any]]:
    """Tracks some steps as a training does, and returns how to see the run."""

    def run(*overrides: str, steps: list[int], meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
        run = WandbRun(begun(*overrides), printed.append)
        for step in steps:
            run.record({"step": step, "loss": 1.0 / step})
        link = run.link()
        meanwhile()
        run.finish(None)
        return link

    return run


@pytest.fixture
def train(dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Trains as the worker does, and returns its trainer state."""

    def run(*overrides: str, meanwhile: Callable[[], None] = lambda: None, name: str = "run") -> dict[str, Any]:
        config = configured("wandb.project=p", *STEPS, *overrides)
        output = tmp_path / name
        output.mkdir()
        folder = dataset(config.data.tokenization)
        job = TrainingPaths(PACKAGED["demo-base"], folder, output, tmp_path / "scratch", MADE_FROM | INPUTS)
        tracked = TrackedTraining(config, job.made_from, {"dataset": "s3://bucket/tests/tokenized/d"})
        with reporter(ALONE, tracked) as opened:
            finetune = LoraFinetune(job, config, ALONE, opened)
            finetune.run()
            meanwhile()
        return json.loads((output / "trainer_state.json").read_text())

    return run


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    """A line of W&B's history as trainer_state.json has it."""
    return {"step": line["_step"]} | {name: value for name, value in line.items() if not name.startswith("_")}


def records(folder: Path) -> list[Any]:
    """All that wandb has written to a run's folder, by wandb's own reader."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (file,) = folder.glob("*.wandb")
    store, found = DataStore(), []
    store.open_for_scan(str(file))
    while data := store.scan_data():
        found.append(wandb_internal_pb2.Record())
        found[-1].ParseFromString(data)
    return found


def items(part: Any) -> dict[str, Any]:
    """What a record of keys and values holds."""
    found: dict[str, Any] = {}
    for item in part:
        *above, key = item.nested_key or [item.key]
        into = found
        for name in above:
            into = into.setdefault(name, {})
        into[key] = json.loads(item.value_json)
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    return [numbers(items(record.history.item)) for record in records(folder) if record.HasField("history")]


def sync(command: str) -> str:
    """Send as the user is told to."""
    bin = Path(sys.executable).parent
    run = subprocess.run(
        command, shell=True, text=True, capture_output=True, env={**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@pytest.mark.system
def test_offline_run_holds_everything(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    options = ("wandb.mode=offline", "wandb.log_model=true", "wandb.watch=all")
    state = train(*options)
    link = state["wandb"]
    folder = Path(link["folder"])
    assert folder.parent == tmp_path / "wandb"
    kept = records(folder)
    (run,) = [record.run for record in kept if record.HasField("run")]
    config = items(run.config.update)
    del config["_wandb"]
    assert config == json.loads(json.dumps(asdict(configured("wandb.project=p", *STEPS, *options))))
    rows = history(folder)
    drawn = [name for name in rows[0] if name.startswith(("gradients/", "parameters/"))]
    assert len(drawn) > 2
    assert sum(rows[-1][drawn[0]]["values"]) > 0
    assert [{name: row[name] for name in row if name not in drawn} for row in rows] == state["history"]
    summary: dict[str, Any] = {}
    for record in kept:
        summary |= items(record.summary.update)
    assert summary["held_out_loss_after"] == state["held_out_loss"]["after"]
    assert summary["tokens"] == state["tokens"]
    artifacts = {record.artifact.name: record.artifact for record in kept if record.HasField("artifact")}
    assert {name: (one.type, one.use_after_commit) for name, one in artifacts.items()} == {
        f"dataset-{'d' * 32}": ("dataset", True),
        f"base-model-{'b' * 32}": ("model", True),
        f"adapter-{ID}": ("model", False),
    }
    assert json.loads(artifacts[f"dataset-{'d' * 32}"].metadata)["fingerprint"] == INPUTS["tokenized_dataset"]
    (reference,) = artifacts[f"dataset-{'d' * 32}"].manifest.contents
    assert reference.ref == "s3://bucket/tests/tokenized/d"


@pytest.mark.soak
@pytest.mark.system
def test_offline_run_is_sent_later(
    train: Callable[..., dict[str, Any]], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = train("wandb.mode=offline", "wandb.log_model=true", "wandb.watch=all")
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    sync(state["wandb"]["sync"])
    assert_all_arrived(server, state)


def assert_all_arrived(server: Server, state: dict[str, Any]) -> None:
    """History, summary, and the lineage from data and base to the adapter."""
    run = server.runs[ID]
    wait_for(lambda: run.exit_code is not None, 60)  # on a busy machine after training has left it
    seen = [{name: row[name] for name in row if "/" not in name} for row in map(numbers, run.history)]
    assert seen == state["history"]
    assert run.exit_code == 0
    assert run.summary["held_out_loss_before"] == state["held_out_loss"]["before"]
    named = {one.id: one.name for one in server.artifacts.values() if one.committed}
    assert sorted(named[used] for used in run.used) == [f"base-model-{'b' * 32}", f"dataset-{'d' * 32}"]
    assert f"adapter-{ID}" in [named[logged] for logged in run.logged]
    assert any(path.endswith("adapter_model.safetensors") for path in server.files)


def test_online_run_is_linked_and_uploaded(
    train: Callable[..., dict[str, Any]], server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    state = train("wandb.log_model=true")
    assert state["wandb"]["url"] == f"{server.url}/someone/p/runs/{ID}"
    assert state["wandb"]["artifact"] == f"someone/p/adapter-{ID}:latest"
    assert_all_arrived(server, state)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


UNUSABLE = ["wrong key", "silent"] + (["no key", "refuses", "no such host"] if os.environ.get("SOAK") else [])


@pytest.mark.system
@pytest.mark.parametrize("how", UNUSABLE)
def test_recorded_offline_where_the_server_cannot_be_used(
    track: Callable[..., dict[str, Any]], server: Server, monkeypatch: pytest.MonkeyPatch, printed: list[str], how: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    wrong = "fedcba9876543210" * 3
    if how == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
    elif how == "wrong key":
        monkeypatch.setenv("WANDB_API_KEY", wrong)
    elif how == "refuses":
        server.stop()
    elif how == "no such host":
        monkeypatch.setenv("WANDB_BASE_URL", "http://no-such-host.invalid")
    else:
        server.silent = True
    link = track(steps=[1, 2])
    assert link["mode"] == "offline"
    (line,) = printed
    assert link["why"] in line
    assert link["sync"] in line
    assert KEY not in line
    assert wrong not in line
    assert whole(Path(link["folder"]))
    assert [row["step"] for row in history(Path(link["folder"]))] == [1, 2]


@pytest.mark.soak
@pytest.mark.system
def test_server_that_is_cut_off_is_not_waited_for(
    train: Callable[..., dict[str, Any]],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The bar is a second; the adapter is there, and the folder is written whole when training has ended."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    gone: list[float] = []

    def cut() -> None:
        server.stop()
        gone.append(time.monotonic())

    state = train("wandb.log_model=true", meanwhile=cut)
    assert time.monotonic() - gone[0] < 1
    assert state["wandb"]["sync"] in capfd.readouterr()[0], "the command that sends it later"
    folder = Path(state["wandb"]["folder"])
    assert whole(folder)
    assert history(folder) == state["history"]


@pytest.mark.soak
@pytest.mark.system
def test_what_a_silent_server_missed_is_sent_once_it_answers(
    track: Callable[..., dict[str, Any]], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)

    def fall_silent() -> None:
        wait_for(lambda: len([one for one in server.artifacts.values() if one.committed]) == 2, 60)
        server.silent = True

    link = track(steps=[1, 2, 3], meanwhile=fall_silent)
    assert whole(Path(link["folder"]))
    server.silent = False
    sync(link["sync"])
    assert [row["_step"] for row in server.runs[ID].history] == [1, 2, 3]
    assert server.runs[ID].exit_code == 0


@pytest.mark.system
def test_killed_training_is_marked_as_failed_and_resumes_the_same_run(
    track: Callable[..., dict[str, Any]], server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It resumes from a checkpoint before its last step: what was recorded is not recorded again."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    (tmp_path / "begin.json").write_text(json.dumps(asdict(begun())))
    code = (
        "import json, os, sys; from pathlib import Path\n"
        "from finetune_assets.training.tracking import Begin, WandbRun\n"
        "run = WandbRun(Begin(**json.loads(Path(sys.argv[1]).read_text())), print); run.link()\n"
        "[run.record({'step': step, 'loss': 1.0}) for step in (1, 2, 3)]; os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "begin.json")])
    assert killed.returncode == -signal.SIGKILL
    wait_for(lambda: ID in server.runs and server.runs[ID].exit_code == 1, 60)
    link = track(steps=[3, 4])
    assert link["mode"] == "online"
    (run,) = server.runs.values()
    wait_for(lambda: run.exit_code == 0, 60)
    assert [row["_step"] for row in run.history] == [1, 2, 3, 4]
    assert run.exit_code == 0


@pytest.mark.soak
@pytest.mark.system
def test_parts_of_an_offline_run_are_sent_as_one(
    track: Callable[..., dict[str, Any]], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    track("wandb.mode=offline", steps=[1, 2, 3])
    link = track("wandb.mode=offline", steps=[3, 4])
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    sync(link["sync"])
    (run,) = server.runs.values()
    assert [row["_step"] for row in run.history] == [1, 2, 3, 3, 4]


def test_watched_weights_that_are_no_numbers_are_left_out() -> None:
    counts, edges = histogram(torch.tensor([0.0, 1.0, float("nan"), float("inf")]))
    assert (sum(counts), edges[0], edges[-1], len(edges)) == (2, 0, 1, len(counts) + 1)


def whole(folder: Path) -> bool:
    """Whether a run's folder gets its last record within a minute."""
    wait_for(lambda: any(record.HasField("exit") for record in records(folder)), 60)
    return True
