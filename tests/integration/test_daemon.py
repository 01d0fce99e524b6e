"""New data under a real daemon: subscribed experiments have adapters; or it is bad, and nothing trains."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from integration.daemon import Daemon, processes_of, running
from projects import TestProject

QUICK = """
subscribed: true
model: {base_model: demo-base, dtype: float32}
data:
  tokenization: {cutoff_len: 192}
  checks: {max_truncated_share: 1.0}
training: {max_steps: 2, macro_batch_size: 8, micro_batch_size: 8, precision: fp32, learning_rate: 1.0e-3}
evaluation: {generated_rows: 4, max_new_tokens: 4}
"""
LONG = QUICK.replace("max_steps: 2", "max_steps: 20000, save_steps: 5, logging_steps: 1")
JOB, RANK = "finetune_assets.launch.bootstrap", "finetune_assets.training"
RUN = "the process of the run"
WORKERS = (JOB, "torch.distributed.run", RANK)
ROUNDS = 5 if os.environ.get("SOAK") else 1
VICTIMS = (RANK, RUN, JOB) if os.environ.get("SOAK") else (RUN,)
"""What is killed alone; with a run ends its job, and test_retry kills a rank."""


@pytest.fixture
def rows(dolly: Path) -> list[str]:
    """Real rows as lines of JSON, short ones, as the tests train on them."""
    lines = dolly.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if len(line) < 500][:400]


@pytest.fixture
def inbox(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The watched folder of a project with two subscribed experiments."""
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
    for name in ("one", "two"):
        project.write_experiment(name, QUICK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ui = ["python", "-m", "finetune_assets.tools.ui", "--port", str(port)]
    with running(project, ui, "Serving dagster-webserver on") as started:
        yield started


@pytest.mark.real_data
def test_file_lands_and_two_experiments_train(daemon: Daemon, inbox: Path, rows: list[str]) -> None:
    """First data, bad data that trains nothing and names its rows, the same mended, the same bytes again, and a new
    experiment."""
    drop(inbox, "a.jsonl", rows[:200])
    daemon.wait_for("two adapters and evaluations", lambda: len(daemon.made("adapter_evaluation")) == 2)
    assert {record.partition_key for record in daemon.made("lora_adapter")} == {"one", "two"}
    assert len(daemon.project.published("adapters")) == 1, "two experiments with the same settings share one adapter"

    drop(inbox, "b.jsonl", broken(rows[200:], 0.5))
    bad = daemon.wait_for("the bad version", lambda: daemon.made("dolly_raw")[1:])
    daemon.wait_for("no run", daemon.quiet)
    with daemon.instance as instance:
        run = instance.get_run_by_id(bad[0].run_id)
        assert run is not None
        assert run.status.value == "FAILURE"
        log = [entry.user_message or entry.message for entry in instance.all_logs(run.run_id)]
    assert any("b.jsonl:1:" in line and "are bad and set aside" in line for line in log), log
    time.sleep(12)
    assert len(daemon.made("lora_adapter")) == 2, "trained on bad data"

    drop(inbox, "b.jsonl", rows[200:])
    daemon.wait_for("two more evaluations", lambda: len(daemon.made("adapter_evaluation")) == 4)
    daemon.wait_for("the page about them", lambda: is_told(daemon))
    daemon.wait_for("no run", daemon.quiet)
    runs = len(daemon.runs())
    (inbox / "b.jsonl").touch()
    drop(inbox, "a.jsonl", rows[:200])
    time.sleep(25)
    assert len(daemon.runs()) == runs, "the same bytes started something"

    daemon.project.write_experiment("three", QUICK + "lora: {rank: 2}\n")
    (made,) = daemon.wait_for("the new experiment's evaluation", lambda: daemon.made("adapter_evaluation")[4:])
    assert made.partition_key == "three"


def is_told(daemon: Daemon) -> bool:
    """Whether the page about all experiments is newer than all that it tells of."""
    pages, evaluations, champions = map(daemon.made, ("experiment_report", "adapter_evaluation", "champion_adapter"))
    return bool(pages) and pages[-1].storage_id > max(one.storage_id for one in evaluations + champions)


@pytest.mark.real_data
def test_what_is_killed_leaves_nothing_behind_and_goes_on(project: TestProject, inbox: Path, rows: list[str]) -> None:
    """Kill -9 of a rank, of the job, of the run, of the daemon, and of all at once, as when the machine goes."""
    drop(inbox, "a.jsonl", rows[:100])
    for number in range(ROUNDS):
        project.write_experiment("long", LONG + f"lora: {{rank: {number + 2}}}\n")
        of_earlier_rounds = checkpoints(project)
        with running(project) as daemon:
            daemon.wait_for("a checkpoint", lambda: checkpoints(project) - of_earlier_rounds)  # noqa: B023
            for victim in VICTIMS:
                kill_and_see_it_go_on(daemon, victim)
            (job,) = processes_of(project, JOB)
            daemon.kill()
            with running(project):
                time.sleep(25)  # by when the code server of the killed one has noticed
                assert processes_of(project, JOB) == [job], "the run needs no daemon, and a new one starts no second"
                for pid in processes_of(project, *WORKERS, "dagster"):
                    os.kill(pid, signal.SIGKILL)
        with running(project) as daemon:
            daemon.wait_for("training that goes on", lambda: times_gone_on(daemon))
            terminate(daemon)
            daemon.wait_for("no process", lambda: not processes_of(project, *WORKERS), 20)


def kill_and_see_it_go_on(daemon: Daemon, victim: str) -> None:
    before = times_gone_on(daemon)
    (job,) = processes_of(daemon.project, JOB)
    all_of_it = processes_of(daemon.project, *WORKERS)
    pid = parent(job) if victim == RUN else processes_of(daemon.project, victim)[0]
    os.kill(pid, signal.SIGKILL)
    daemon.wait_for(f"the end of all below {victim}", lambda: not set(all_of_it) & set(alive(daemon)), 5)
    daemon.wait_for(f"training that goes on after {victim}", lambda: times_gone_on(daemon) > before)


def alive(daemon: Daemon) -> list[int]:
    return processes_of(daemon.project, *WORKERS)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def checkpoints(project: TestProject) -> set[Path]:
    return set(project.store_root.rglob("checkpoints/**/manifest.json"))


def times_gone_on(daemon: Daemon) -> int:
    return daemon.log.read_text(errors="replace").count("going on from the checkpoint of step")


def terminate(daemon: Daemon) -> None:
    """As the UI does."""
    record = next(record for record in daemon.runs() if not record.dagster_run.is_finished)
    with daemon.instance as instance:
        instance.run_coordinator.cancel_run(record.dagster_run.run_id)


@pytest.mark.real_data
def test_terminated_run_ends_within_15_seconds_and_keeps_a_checkpoint(
    project: TestProject, inbox: Path, rows: list[str]
) -> None:
    drop(inbox, "a.jsonl", rows[:100])
    project.write_experiment("long", LONG)  # before the daemon starts, which then knows its name
    with running(project) as daemon:
        for number in range(ROUNDS):
            of_earlier_rounds = checkpoints(project)
            if number:
                project.write_experiment("long", LONG + f"lora: {{rank: {number + 2}}}\n")
            daemon.wait_for("a checkpoint", lambda: checkpoints(project) - of_earlier_rounds)  # noqa: B023
            daemon.wait_for("a training process", lambda: processes_of(project, RANK))
            began = time.monotonic()
            terminate(daemon)
            daemon.wait_for("no process", lambda: not processes_of(project, *WORKERS), 20)
            assert time.monotonic() - began <= 15
            kept = checkpoints(project) - of_earlier_rounds
            assert kept
            assert all(json.loads(manifest.read_text()) for manifest in kept)
            daemon.wait_for("the end of the run", daemon.quiet)
            assert daemon.runs()[0].dagster_run.status is dg.DagsterRunStatus.CANCELED
        time.sleep(35)  # Dagster's retry policy starts a terminated step again after its delay
        assert not processes_of(project, *WORKERS)
        assert daemon.quiet()
