"""New data under a real daemon: subscribed experiments have adapters; or it is bad, and nothing trains."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from integration import cli
from integration.daemon import JOB, RANK, WORKERS, Daemon, first_steps, process_of_run, processes_of, ranks_of, running
from processes import kill
from projects import TestProject

QUICK = """
subscribed: true
model: {base_model: demo-base, dtype: float32}
data:
  tokenization: {cutoff_len: 192}
  checks: {max_truncated_share: 1.0}
training: {max_steps: 2, macro_batch_size: 2, micro_batch_size: 2, precision: fp32, learning_rate: 1.0e-3}
evaluation: {generated_rows: 4, general_tokens: 500, max_new_tokens: 4}
"""
STEPS = 20_000
LONG = QUICK.replace("max_steps: 2", f"max_steps: {STEPS}, save_steps: 5, logging_steps: 1")
RUN = "the process of the run"
ALONE = "No heartbeat received"
"""What a code server of Dagster's tells when it notices that its daemon is gone."""
SOAK = bool(os.environ.get("SOAK"))
ROUNDS = 5 if SOAK else 1
VICTIMS = (RANK, RUN, JOB) if SOAK else (RUN,)
"""What is killed alone; with a run ends its job, and test_retry kills a rank."""


@pytest.fixture
def rows(dolly: Path) -> list[str]:
    """Real rows as lines of JSON, short ones, as the tests train on them."""
    lines = dolly.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if len(line) < 500][:400]


@pytest.fixture
def inbox(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The watched folder of a project without experiments."""
    for path in (project.configs / "experiments").glob("*.yaml"):
        path.unlink()
    folder = project.root / "inbox"
    folder.mkdir()
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(folder))
    return folder


def drop(folder: Path, name: str, lines: list[str]) -> None:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def broken(lines: list[str], share: float) -> list[str]:
    count = round(len(lines) * share)
    return [line[: len(line) // 2] for line in lines[:count]] + lines[count:]


@pytest.fixture
def daemon(project: TestProject, inbox: Path) -> Iterator[Daemon]:
    for name in ("one", "two") if SOAK else ("one",):  # test_production has two
        project.write_experiment(name, QUICK)
    with running(project) as started:
        yield started


@pytest.fixture
def ui(project: TestProject, inbox: Path) -> Iterator[Daemon]:
    """The daemon and the page, as `make ui` starts them."""
    project.write_experiment("one", QUICK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["finetune", "ui", "--port", str(port)]
    with running(project, command, "Serving dagster-webserver on") as started:
        yield started


@pytest.mark.real_data
def test_file_lands_and_experiments_train(daemon: Daemon, inbox: Path, rows: list[str]) -> None:
    names = {"one", "two"} if SOAK else {"one"}
    drop(inbox, "a.jsonl", rows[:100])
    daemon.wait_for("their evaluations", lambda: len(daemon.made("adapter_evaluation")) == len(names))
    assert {record.partition_key for record in daemon.made("lora_adapter")} == names
    assert len(daemon.project.published("adapters")) == 1, "two experiments with the same settings share one adapter"


@pytest.mark.minutes
@pytest.mark.system
@pytest.mark.soak
@pytest.mark.real_data
def test_bad_data_trains_nothing_and_is_trained_on_once_mended(daemon: Daemon, inbox: Path, rows: list[str]) -> None:
    """It names its rows; test_scenarios has what sensors decide then."""
    drop(inbox, "a.jsonl", broken(rows[:100], 0.5))
    is_set_aside(daemon, "a.jsonl", 50)
    assert not daemon.made("cached_base_model")
    drop(inbox, "a.jsonl", rows[:100])
    daemon.wait_for("an evaluation", lambda: daemon.made("adapter_evaluation"))


@pytest.mark.minutes
@pytest.mark.system
@pytest.mark.soak
@pytest.mark.real_data
def test_what_trains_an_experiment_and_what_does_not(ui: Daemon, inbox: Path, rows: list[str]) -> None:
    """First data, the same bytes again, more data, and a new experiment."""
    drop(inbox, "a.jsonl", rows[:100])
    ui.wait_for("an adapter that is evaluated", lambda: ui.made("adapter_evaluation"))
    ui.wait_for("the page about it", lambda: is_told(ui))
    ui.wait_for("no run", ui.quiet)
    runs = len(ui.runs())
    (inbox / "a.jsonl").touch()
    ui.wait_for_ticks("raw_data_sensor", 3)
    drop(inbox, "a.jsonl", rows[:100])
    ui.wait_for_ticks("raw_data_sensor", 3)
    ui.wait_for_ticks("experiments_sensor")
    assert len(ui.runs()) == runs, "the same bytes started something"

    drop(inbox, "b.jsonl", rows[100:200])
    ui.wait_for("a second adapter", lambda: len(ui.made("lora_adapter")) == 2)
    ui.project.write_experiment("three", QUICK + "lora: {rank: 2}\n")
    ui.wait_for("the new experiment's evaluation", lambda: len(ui.made("adapter_evaluation")) == 3)
    assert [record.partition_key for record in ui.made("lora_adapter")] == ["one", "one", "three"]
    assert len(ui.project.published("adapters")) == 3


def is_set_aside(daemon: Daemon, file: str, count: int) -> None:
    """Wait until the version with a file of bad rows has been read, see that it names the first, and starts nothing."""
    raw, adapters = len(daemon.made("dolly_raw")), len(daemon.made("lora_adapter"))
    (bad,) = daemon.wait_for("the bad version", lambda: daemon.made("dolly_raw")[raw:])
    daemon.wait_for("no run", daemon.quiet)
    run = daemon.held.get_run_by_id(bad.run_id)
    assert run
    assert run.status is dg.DagsterRunStatus.FAILURE
    (check,) = daemon.failed_checks(bad.run_id)
    assert check.check_name == "quarantine"
    assert check.metadata["rows"].value == count
    assert f"{file}:1:" in check.description
    daemon.wait_for_ticks("experiments_sensor")
    assert daemon.quiet()
    assert len(daemon.made("lora_adapter")) == adapters, "trained on bad data"


def is_told(daemon: Daemon) -> bool:
    """Whether the page about all experiments is newer than all that it tells of."""
    pages, evaluations, champions = map(daemon.made, ("experiment_report", "adapter_evaluation", "champion_adapter"))
    return bool(pages) and pages[-1].storage_id > max(one.storage_id for one in evaluations + champions)


@pytest.mark.soak
@pytest.mark.minutes
@pytest.mark.system
@pytest.mark.real_data
def test_what_is_killed_leaves_nothing_behind_and_goes_on(project: TestProject, inbox: Path, rows: list[str]) -> None:
    """Kill -9 of the run, of the daemon, and of all at once, as when the machine goes; then the run is terminated."""
    drop(inbox, "a.jsonl", rows[:100])
    for number in range(ROUNDS):
        project.write_experiment("long", LONG + f"lora: {{rank: {number + 2}}}\n")
        of_earlier_rounds = checkpoints(project)
        with running(project, own_servers=True) as daemon:
            daemon.wait_for("a checkpoint", lambda: checkpoints(project) - of_earlier_rounds)  # noqa: B023
            for victim in VICTIMS:
                kill_and_see_it_go_on(daemon, victim)
            (job,) = processes_of(project, JOB)
            told = len(daemon.log.read_text())
            daemon.kill()
            with running(project, own_servers=True) as another:
                another.wait_for("its code server", lambda: ALONE in daemon.log.read_text()[told:])  # noqa: B023
                another.wait_for_ticks("dead_runs_sensor")
                assert processes_of(project, JOB) == [job], "the run needs no daemon, and a new one starts no second"
                before = times_gone_on(another)
                kill(processes_of(project, *WORKERS, "dagster"))
        with running(project, own_servers=True) as daemon:
            daemon.wait_for("training that goes on", lambda: times_gone_on(daemon) > before)  # noqa: B023
            terminate_and_see_it_end(daemon, of_earlier_rounds)


def kill_and_see_it_go_on(daemon: Daemon, victim: str) -> None:
    before = times_gone_on(daemon)
    all_of_it = processes_of(daemon.project, *WORKERS)
    pids = {
        RUN: lambda: process_of_run(daemon.held, unfinished(daemon)),
        JOB: lambda: processes_of(daemon.project, JOB)[0],
        RANK: lambda: ranks_of(daemon.project)[0],
    }
    os.kill(pids[victim](), signal.SIGKILL)
    daemon.wait_for(f"the end of all below {victim}", lambda: not set(all_of_it) & set(alive(daemon)), 5)
    daemon.wait_for(f"training that goes on after {victim}", lambda: times_gone_on(daemon) > before)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def alive(daemon: Daemon) -> list[int]:
    return processes_of(daemon.project, *WORKERS)


def checkpoints(project: TestProject) -> set[Path]:
    return set(project.store_root.rglob("checkpoints/**/manifest.json"))


def times_gone_on(daemon: Daemon) -> int:
    """How many attempts at a training began after its first step."""
    runs = [record.dagster_run.run_id for record in daemon.runs()]
    return sum(step > 1 for run_id in runs for step in first_steps(daemon.held, run_id, STEPS))


def terminate_and_see_it_end(daemon: Daemon, of_earlier_rounds: set[Path]) -> None:
    """End the run as the UI does: within 15 s no process is left of it, a checkpoint is, and it stays ended."""
    daemon.wait_for("a training process", lambda: processes_of(daemon.project, RANK))
    run = process_of_run(daemon.held, unfinished(daemon))
    began = time.monotonic()
    daemon.held.run_coordinator.cancel_run(unfinished(daemon))
    daemon.wait_for("no process", lambda: not processes_of(daemon.project, *WORKERS), 20)
    assert time.monotonic() - began <= 15
    kept = checkpoints(daemon.project) - of_earlier_rounds
    assert kept
    assert all(json.loads(manifest.read_text()) for manifest in kept)
    daemon.wait_for("the end of the run", daemon.quiet)
    assert daemon.runs()[0].dagster_run.status is dg.DagsterRunStatus.CANCELED
    # A run whose step waits to be tried again is a process that lives
    daemon.wait_for("the end of the run's process", lambda: not is_alive(run), 20)
    daemon.wait_for_ticks("experiments_sensor")
    daemon.wait_for_ticks("dead_runs_sensor")
    assert not processes_of(daemon.project, *WORKERS)
    assert daemon.quiet()


def unfinished(daemon: Daemon) -> str:
    """The run that goes on."""
    return next(record.dagster_run.run_id for record in daemon.runs() if not record.dagster_run.is_finished)


@pytest.mark.soak
@pytest.mark.real_data
def test_terminated_run_ends_within_15_seconds_and_keeps_a_checkpoint(
    project: TestProject, inbox: Path, rows: list[str]
) -> None:
    """Again and again under one daemon; once is in the story above."""
    drop(inbox, "a.jsonl", rows[:100])
    project.write_experiment("long", LONG)  # before the daemon starts, which then knows its name
    with running(project, own_servers=True) as daemon:
        for number in range(ROUNDS):
            of_earlier_rounds = checkpoints(project)
            if number:
                project.write_experiment("long", LONG + f"lora: {{rank: {number + 2}}}\n")
            daemon.wait_for("a checkpoint", lambda: checkpoints(project) - of_earlier_rounds)  # noqa: B023
            terminate_and_see_it_end(daemon, of_earlier_rounds)


@pytest.mark.system
@pytest.mark.soak
@pytest.mark.real_data
def test_neither_a_bad_file_nor_another_source_costs_the_good_rows(
    project: TestProject, inbox: Path, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good rows, a bad file before they are trained, another source by hand, and the bad file removed."""
    project.write_experiment("one", QUICK)
    with running(project) as daemon:
        drop(inbox, "a.jsonl", rows[:100])
        (good,) = daemon.wait_for("the good version", lambda: daemon.made("dolly_raw"))
        drop(inbox, "b.jsonl", broken(rows[100:150], 1.0))
        (adapter,) = daemon.wait_for("an adapter of the good rows", lambda: daemon.made("lora_adapter"))
        is_set_aside_later = daemon.wait_for("the bad version", lambda: daemon.made("dolly_raw")[1:])
        assert len(is_set_aside_later) == 1
        daemon.wait_for("its evaluation", lambda: daemon.made("adapter_evaluation"))
        assert made_from_raw(project, adapter) == version_of(good)

        daemon.wait_for("the page about it", lambda: is_told(daemon))
        with monkeypatch.context() as by_hand:
            by_hand.setenv("FINETUNE_RAW_DATA", "sample")
            assert cli.materialize("dolly_raw", None).returncode == 0
        daemon.wait_for("no run", daemon.quiet)
        runs = len(daemon.runs())
        daemon.wait_for_ticks("experiments_sensor", 3)
        assert len(daemon.runs()) == runs, "rows of another source started something"

        (inbox / "b.jsonl").unlink()
        daemon.wait_for("the good version again", lambda: daemon.made("dolly_raw")[3:])
        daemon.wait_for("no run", daemon.quiet)
        daemon.wait_for_ticks("experiments_sensor", 2)
        assert daemon.quiet()
        assert [version_of(record) for record in daemon.made("lora_adapter")] == [version_of(adapter)], "trained again"


def version_of(record: Any) -> str:
    version: str = record.asset_materialization.tags["dagster/data_version"]
    return version


def made_from_raw(project: TestProject, adapter: Any) -> str:
    manifest = project.store.manifest("adapters", version_of(adapter))
    assert manifest
    return str(manifest.made_from["dolly_raw"])
