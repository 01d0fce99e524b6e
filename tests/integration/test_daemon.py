"""New data under a real daemon: subscribed experiments have adapters; or it is bad, and nothing trains."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

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
LONG = QUICK.replace("max_steps: 2", "max_steps: 4000, save_steps: 5, logging_steps: 1")
WORKERS = ("finetune_assets.launch.bootstrap", "torch.distributed.run", "finetune_assets.training")
ROUNDS = 5 if os.environ.get("SOAK") else 1


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
    with running(project) as started:
        yield started


@pytest.mark.real_data
def test_file_lands_and_two_experiments_train(daemon: Daemon, inbox: Path, rows: list[str]) -> None:
    """First data, bad data that trains nothing and names its rows, the same mended, and the same bytes again."""
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
    daemon.wait_for("no run", daemon.quiet)
    runs = len(daemon.runs())
    (inbox / "b.jsonl").touch()
    drop(inbox, "a.jsonl", rows[:200])
    time.sleep(25)
    assert len(daemon.runs()) == runs, "the same bytes started something"


@pytest.mark.real_data
@pytest.mark.parametrize("victim", ["step worker", "run worker", "daemon"])
def test_what_is_killed_leaves_nothing_behind_and_goes_on(
    project: TestProject, inbox: Path, rows: list[str], victim: str
) -> None:
    for round_ in range(ROUNDS):
        name = f"long{round_}"
        project.write_experiment(name, LONG.replace("seed: 0", "") + f"lora: {{rank: {round_ + 2}}}\n")
        drop(inbox, "a.jsonl", rows[:100])
        with running(project) as daemon:
            first = daemon.wait_for("a first checkpoint", lambda: _checkpoints(project))
            if victim == "daemon":
                daemon.kill()
                for pid in processes_of(project, "dagster", *WORKERS):
                    os.kill(pid, signal.SIGKILL)
            else:
                word = WORKERS[0] if victim == "step worker" else "execute_run"
                (pid, *_) = processes_of(project, word)
                os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + 5
            while processes_of(project, WORKERS[2]) and time.monotonic() < end and victim != "step worker":
                time.sleep(0.2)
            if victim == "run worker":
                assert not [pid for pid in processes_of(project, *WORKERS) if _older(pid, 5)], "orphans"
            if victim != "daemon":
                daemon.wait_for("training that goes on", lambda: _went_on(daemon))
        if victim == "daemon":
            with running(project) as again:
                again.wait_for("training that goes on", lambda: _went_on(again))
        assert first
        (project.configs / "experiments" / f"{name}.yaml").unlink()


def _older(pid: int, seconds: float) -> bool:
    try:
        started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return False
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - started / os.sysconf("SC_CLK_TCK") > seconds


def _checkpoints(project: TestProject) -> list[Path]:
    return list(project.store_root.rglob("checkpoints/*/*/*/manifest.json")) or list(
        project.store_root.rglob("checkpoints/**/manifest.json")
    )


def _went_on(daemon: Daemon) -> bool:
    said = [path.read_text(errors="replace") for path in (daemon.project.root / "dagster_home").rglob("*.out")]
    return any("going on from the checkpoint of step" in text for text in said)


@pytest.mark.real_data
def test_terminated_run_ends_within_15_seconds_and_keeps_a_checkpoint(
    project: TestProject, inbox: Path, rows: list[str]
) -> None:
    project.write_experiment("long", LONG)
    drop(inbox, "a.jsonl", rows[:100])
    with running(project) as daemon:
        for _ in range(ROUNDS):
            daemon.wait_for("a training process", lambda: processes_of(project, WORKERS[2]))
            daemon.wait_for("a checkpoint", lambda: _checkpoints(project))
            record = next(record for record in daemon.runs() if not record.dagster_run.is_finished)
            with daemon.instance as instance:
                began = time.monotonic()
                instance.run_coordinator.cancel_run(record.dagster_run.run_id)
            daemon.wait_for("no process", lambda: not processes_of(project, *WORKERS), 20)
            assert time.monotonic() - began <= 15
            assert _checkpoints(project)
            assert json.loads(_checkpoints(project)[0].read_text())
