"""What is made of Slurm's answers: recorded from a real cluster, and printed again by programs of the same names.

`test_slurm` has the real ones.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.config.cluster import SlurmJob
from finetune_assets.errors import UserError
from finetune_assets.launch import slurm
from finetune_assets.launch.slurm import JobState, SlurmEngine
from finetune_assets.store.objects import ObjectStorage
from finetune_assets.worker.job import JobFailed, JobSpec
from finetune_assets.worker.remote import TERMINATED, RemoteJob

Make = Callable[..., JobSpec]
Says = Callable[..., None]
ANSWERS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("slurm_answers.json").read_text())["answers"]
PROGRAM = """#!/bin/sh
echo "{name} $*" >> {folder}/asked
answer={folder}/answers/{name}
[ "$1 $2" != "show hostnames" ] || answer="$answer-hostnames"
[ ! -e "$answer-after-scancel" ] || ! grep -q ^scancel {folder}/asked || answer="$answer-after-scancel"
[ -e "$answer" ] || exit 0
cat "$answer.err" >&2
cat "$answer"
exit $(cat "$answer.code")
"""


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Makes one of Slurm's programs print a recorded answer; others print nothing."""
    (tmp_path / "answers").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel", "sinfo"):
        program = tmp_path / "bin" / name
        program.write_text(PROGRAM.format(name=name, folder=tmp_path))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def make(program: str, answer: str) -> None:
        path, recorded = tmp_path / "answers" / program, ANSWERS[answer]
        path.write_text(recorded["out"])
        path.with_name(f"{program}.err").write_text(recorded["err"])
        path.with_name(f"{program}.code").write_text(str(recorded["code"]))

    make("scontrol-hostnames", "hostnames")
    return make


def asked(tmp_path: Path, program: str) -> list[str]:
    """What a program was asked."""
    lines = (tmp_path / "asked").read_text().splitlines()
    return [line.partition(" ")[2] for line in lines if line.startswith(program)]


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("running", JobState("RUNNING", "None", "n[1-2]", "2026-11-27T23:26:39", 5, False, "n1")),
        ("pending", JobState("PENDING", "Resources", "", "2026-11-28T01:26:39")),
        ("held", JobState("PENDING", "JobHeldUser", "", "Unknown")),
        ("completing", JobState("COMPLETING", "None", "n[1-2]", "2026-11-27T23:26:39", 5, False, "n1")),
        ("cancelled", JobState("CANCELLED", "None", "n[1-2]", "2026-11-27T23:26:39", 5, False, "n1")),
        ("cancelled before it ran", JobState("CANCELLED", "Resources", "", "2026-11-27T23:26:44")),
        ("failed", JobState("FAILED", "NonZeroExitCode", "n1", "2026-11-27T23:26:48", 0, False, "n1")),
        ("completed", JobState("COMPLETED", "None", "n1", "2026-11-27T23:26:48", 1, False, "n1")),
        ("lost node", JobState("NODE_FAIL", "NodeDown", "n[1-2]", "2026-11-27T23:27:24", 28, False, "n1")),
        ("lost first node", JobState("RUNNING", "None", "n2", "2026-11-27T23:29:14", 29, False, "n1")),
        ("preempted", JobState("PREEMPTED", "None", "n[1-2]", "2026-11-27T23:28:35", 34, True, "n1")),
        ("time limit", JobState("TIMEOUT", "TimeLimit", "n1", "2026-11-27T23:29:53", 63, False, "n1")),
    ],
)
def test_state_of_a_job(says: Says, answer: str, state: JobState) -> None:
    says("scontrol", answer)
    assert slurm.state_of("1") == state
    assert (state.name in slurm.ENDED) == (state.name not in ("RUNNING", "PENDING", "COMPLETING"))


def test_job_that_is_forgotten_has_ended_and_a_silent_controller_says_nothing(says: Says) -> None:
    says("scontrol", "unknown")
    state = slurm.state_of("99999")
    assert state
    assert state.name in slurm.ENDED
    says("scontrol", "no controller")
    assert slurm.state_of("1") is None


def test_job_that_has_lost_its_first_node_is_noticed(says: Says, tmp_path: Path) -> None:
    says("scontrol", "running")
    state = slurm.state_of("1")
    assert state
    assert not state.headless
    says("scontrol", "lost first node")
    state = slurm.state_of("1")
    assert state
    (tmp_path / "answers" / "scontrol-hostnames").write_text("n2\n")
    assert state.headless


def test_place_in_the_queue(says: Says) -> None:
    says("scontrol", "pending")
    says("squeue", "squeue")
    state = slurm.state_of("2")
    assert state
    for number, place in (("2", "1 of 3"), ("4", "2 of 3"), ("3", "3 of 3")):
        text = slurm._describe(number, state)
        assert all(fact in text for fact in ("PENDING", "Resources", place, "2026-11-28T01:26:39"))


@pytest.mark.parametrize(
    ("answer", "settings", "facts"),
    [
        (
            "sbatch partition",
            {"slurm": SlurmJob(partition="nope")},
            ("launcher.slurm.partition", "'nope'", "main", "short", "urgent"),
        ),
        ("sbatch gpus", {"gpus_per_node": 8}, ("launcher.gpus_per_node",)),
        ("sbatch time", {"time_limit": "abc"}, ("--time",)),
        ("sbatch memory", {"memory": "9999G"}, ("memory",)),
        ("sbatch constraint", {"slurm": SlurmJob(extra_arguments=["--constraint=h100"])}, ("feature",)),
    ],
)
def test_refusal_names_the_setting(
    job: Make, says: Says, tmp_path: Path, answer: str, settings: dict[str, Any], facts: tuple[str, ...]
) -> None:
    says("sbatch", answer)
    says("sinfo", "sinfo")
    with pytest.raises(UserError) as refused:
        SlurmEngine().run(job("good", **settings), {})
    assert not refused.value.retriable
    assert all(fact in str(refused.value) for fact in facts)
    assert len(str(refused.value).splitlines()) == 1
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n"
        "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
        "sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
        "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's "
        "size and/or time limits)",
    ],
)
def test_busy_controller_may_be_tried_again(job: Make, said: str) -> None:
    refused = slurm._rejection(job("good"), said)
    assert isinstance(refused, JobFailed)
    assert refused.retriable


@pytest.mark.parametrize(
    ("answer", "setting"),
    [
        ("too many nodes", "launcher.nodes"),
        ("too long", "launcher.time_limit"),
        ("too many cores", "launcher.cpus_per_node"),
    ],
)
def test_job_that_would_wait_for_ever_is_cancelled(
    job: Make, says: Says, tmp_path: Path, answer: str, setting: str
) -> None:
    says("sbatch", "sbatch")
    says("scontrol", answer)
    says("scontrol-after-scancel", "cancelled before it ran")
    with pytest.raises(UserError, match=setting) as refused:
        SlurmEngine().run(job("good"), {})
    assert not refused.value.retriable
    assert asked(tmp_path, "scancel") == ["1"]
    assert_nothing_left(tmp_path)


def test_job_of_a_killed_run_is_cancelled_first(job: Make, says: Says, tmp_path: Path) -> None:
    says("squeue", "squeue")
    says("scontrol", "running")
    says("scontrol-after-scancel", "cancelled")
    says("sbatch", "sbatch partition")
    with pytest.raises(UserError):
        SlurmEngine().run(job("good"), {})
    assert asked(tmp_path, "scancel")[:3] == ["2", "4", "3"]
    assert f"--name finetune-{job('good').makes}" in asked(tmp_path, "squeue")[0]


def test_headless_job_is_cancelled_and_may_be_tried_again(job: Make, says: Says, tmp_path: Path) -> None:
    says("sbatch", "sbatch")
    says("scontrol", "lost first node")
    says("scontrol-after-scancel", "cancelled")
    (tmp_path / "answers" / "scontrol-hostnames").write_text("n2\n")
    with pytest.raises(JobFailed, match="n1") as failed:
        SlurmEngine().run(job("good", "1", (1, 2)), {})
    assert failed.value.retriable
    assert asked(tmp_path, "scancel") == ["1"]


@pytest.mark.parametrize(
    ("answer", "retriable", "fact"),
    [
        ("time limit", False, "launcher.time_limit"),
        ("preempted", True, ""),
        ("lost node", True, "n[1-2]"),
        ("cancelled", False, ""),
        ("failed", True, "NonZeroExitCode"),
        ("completed", True, "COMPLETED"),
    ],
)
def test_how_a_job_without_an_answer_ended(job: Make, says: Says, answer: str, retriable: bool, fact: str) -> None:
    says("sbatch", "sbatch")
    says("scontrol", answer)
    with pytest.raises(JobFailed) as failed:
        SlurmEngine().run(job("good"), {})
    assert failed.value.retriable == retriable
    assert fact in str(failed.value)


OWN = {"error": "rank: 0 is wrong", "retriable": False, "specificity": 0}


@pytest.mark.parametrize(
    ("state", "answer", "retriable", "fact"),
    [
        (JobState("FAILED", "NonZeroExitCode", ran=600), OWN, False, "rank: 0 is wrong"),
        (JobState("FAILED", "NonZeroExitCode", ran=600), TERMINATED, False, "launcher.time_limit"),
        (JobState("FAILED", "NonZeroExitCode", ran=10), TERMINATED, True, ""),
        (JobState("FAILED", "NonZeroExitCode", ran=10, preempted=True), TERMINATED, True, ""),
        (JobState("TIMEOUT", "TimeLimit", ran=600), TERMINATED, False, "launcher.time_limit"),
    ],
)
def test_a_workers_own_error_counts_more_than_what_slurm_says(
    job: Make, state: JobState, answer: dict[str, Any], retriable: bool, fact: str
) -> None:
    spec = job("good", time_limit="0:10:00")
    remote = RemoteJob.begin(spec)
    remote.answer(0, answer)
    with pytest.raises(JobFailed) as failed:
        slurm._outcome(state, "7", remote, spec)
    assert failed.value.retriable == retriable
    assert fact in str(failed.value)


def test_what_is_set_is_asked_for(job: Make) -> None:
    settings = {
        "gpus_per_node": 8,
        "cpus_per_node": 64,
        "memory": "512G",
        "time_limit": "1-00:00:00",
        "slurm": SlurmJob("gpu", "me", "high", "/opt/python", ["--constraint=h100"]),
    }
    spec = job("good", "auto", (2, 4), **settings)
    arguments = slurm.arguments(spec, "finetune-x", Path("/logs/x.log"))
    assert set(arguments) >= {
        "--job-name=finetune-x",
        "--nodes=2-4",
        "--output=/logs/x.log",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--mem=512G",
        "--time=1-00:00:00",
        f"--signal=TERM@{slurm.GRACE_SECONDS}",
        "--partition=gpu",
        "--account=me",
        "--qos=high",
        "--no-requeue",
        "--no-kill",
    }
    assert arguments[-1] == "--constraint=h100", "the last wins"
    script = slurm.script(spec, RemoteJob(spec.store, "me", "abc", "0" * 64))
    assert f"{spec.store} me abc {'0' * 64}" in script
    assert "--cpus-per-task=64" in script
    assert "/opt/python -m finetune_assets.worker.node" in script
    least = slurm.arguments(job("good"), "finetune-x", Path("/logs/x.log"))
    assert not [flag for flag in least if flag.startswith(("--signal", "--time", "--mem", "--gpus", "--no-kill"))]


RECORDING = """#!/bin/sh
env > {folder}/{name}.env
cat > {folder}/{name}.input
echo 7
"""


def test_environment_of_a_job_is_not_that_of_sbatch(
    says: Says, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable of the loader or of a search path is set by the script; none replaces a variable of the launcher."""
    for name in ("sbatch", "srun"):
        (tmp_path / "bin" / name).write_text(RECORDING.format(folder=tmp_path, name=name))
        (tmp_path / "bin" / name).chmod(0o755)
    tricky = "a b'c\"$(touch pwned)\n#SBATCH --uid=0"
    settings = {"PATH": "/nowhere", "LD_PRELOAD": "", "PYTHONPATH": "/nowhere", "NCCL_DEBUG": tricky, "GIVEN": "theirs"}
    monkeypatch.setenv("PYTHONPATH", "/own")
    spec = job("good", environment={**settings, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin:/nowhere"})
    remote = RemoteJob(spec.store, "me", "abc")
    number = SlurmEngine()._submit(spec, remote, "finetune-x", tmp_path / "x.log", {"GIVEN": "ours"})
    assert number == "7"
    submitted = (tmp_path / "sbatch.env").read_text()
    assert "/nowhere" not in submitted
    assert "NCCL_DEBUG" not in submitted
    assert "LD_PRELOAD" not in submitted
    assert "PYTHONPATH=/own" in submitted.splitlines()
    script = (tmp_path / "sbatch.input").read_text()
    slurms = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    inherited = {**os.environ, **slurms, "GIVEN": "ours"}
    subprocess.run(["/bin/sh"], input=script, env=inherited, cwd=tmp_path, text=True, check=True)
    started = (tmp_path / "srun.env").read_text()
    assert "PYTHONPATH=/nowhere" in started.splitlines()
    assert f"NCCL_DEBUG={tricky}" in started
    assert "GIVEN=ours" in started.splitlines()
    assert not (tmp_path / "pwned").exists()


def test_job_goes_on_while_its_store_is_away(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lingering = slurm._Lingering(RemoteJob.begin(job("good")))
    with monkeypatch.context() as away:
        away.setattr(ObjectStorage, "listing", _away)
        assert not lingering.long()
    lingering.remote.end()


def _away(*_: object) -> bool:
    raise UserError("the store does not answer")


def test_without_slurm_the_setting_is_named(job: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"launcher\.engine.*sbatch"):
        SlurmEngine().run(job("good"), {})


def assert_nothing_left(tmp_path: Path) -> None:
    assert [stored.key for stored in ObjectStorage(f"file://{tmp_path}/store").listing("me/jobs")] == []
