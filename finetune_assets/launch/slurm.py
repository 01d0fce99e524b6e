"""Run jobs on Slurm, through its command line.

FINETUNE_SLURM_FOLDER: folder that this machine and the nodes share, for the jobs' output; default `slurm` in
    FINETUNE_CACHE.
"""

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.config.cluster import seconds_of
from finetune_assets.errors import UserError
from finetune_assets.launch.log_tail import Followed
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.worker.job import JobFailed, JobSpec
from finetune_assets.worker.remote import RemoteJob

POLL_SECONDS = 2.0, 15.0
"""How often the controller is asked: at first, and in a job that has gone on for long. It serves others too."""
GRACE_SECONDS = 60
"""A job is told so long before its time limit, and keeps a checkpoint."""
TOLD_SECONDS = GRACE_SECONDS + 60 + 15
"""How long before its limit a job that obeys may have ended: Slurm tells it up to 60 s earlier than it is asked to."""
CANCEL_SECONDS = 120
"""How long a cancelled job may take; the cluster's KillWait is 30 s where nobody has set it."""
LINGER_SECONDS = 60
"""How long a job may go on whose first machine has ended: where another died, srun may wait for it for ever."""
SILENT_SECONDS = 600
"""How long a controller may be down."""
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
    "REVOKED",
}  # fmt: skip
NEVER = {
    "PartitionTimeLimit": "launcher.time_limit is more than the partition gives",
    "PartitionNodeLimit": "launcher.nodes are more than the partition gives",
    "PartitionConfig": "it asks for more than the partition has: see launcher.nodes, launcher.time_limit and "
    "launcher.cpus_per_node",
    "BadConstraints": "no node has what it asks for: see launcher.gpus_per_node, launcher.memory and "
    "launcher.slurm.extra_arguments",
    "AccountNotAllowed": "launcher.slurm.account may not use the partition",
    "QOSNotAllowed": "launcher.slurm.qos may not use the partition",
    "InvalidAccount": "launcher.slurm.account is not known",
    "InvalidQOS": "launcher.slurm.qos is not known",
    "AssocMaxNodePerJobLimit": "launcher.nodes are more than the account gives",
    "QOSMaxNodePerJobLimit": "launcher.nodes are more than the quality of service gives",
    "QOSMaxWallDurationPerJobLimit": "launcher.time_limit is more than the quality of service gives",
    "AssocMaxWallDurationPerJobLimit": "launcher.time_limit is more than the account gives",
}
"""Reasons for which a job waits for ever."""
REFUSED = {
    "invalid partition": "launcher.slurm.partition: there is no '{partition}' in this cluster; it has {partitions}",
    "invalid account": "launcher.slurm.account: '{account}' is not one that you may use",
    "invalid qos": "launcher.slurm.qos: '{qos}' is not one that you may use",
    "invalid generic resource": "launcher.gpus_per_node: this cluster has no GPUs that Slurm knows of (GresTypes)",
    "invalid time limit": "launcher.time_limit: '{time_limit}' is not one that Slurm takes",
    "time limit exceed": "launcher.time_limit: '{time_limit}' is more than the partition gives",
    "requested time limit is invalid": "launcher.time_limit: '{time_limit}' is more than the partition gives",
    "node count specification invalid": "launcher.nodes: '{nodes}' are more than the partition has",
    "node configuration is not available": "no node of this cluster has what launcher asks for (GPUs, cores, memory)",
    "more processors requested than permitted": "launcher.cpus_per_node: {cpus} are more than a node has",
}
"""What sbatch says to a job that would never run, and which setting it means."""
BUSY = (
    "maxsubmit", "job submit limit", "temporarily unable", "resource temporarily unavailable", "unable to contact",
    "timed out", "connection refused", "communication", "zero bytes",
)  # fmt: skip
"""What it says where another time may do."""
OWN = ("SLURM_CONF", "SLURM_JWT")
"""Of Slurm's variables, those that say which cluster is asked, and by whom."""
SCRIPT = """#!/bin/sh
export FINETUNE_HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))"
export FINETUNE_MEETING="$SLURM_JOB_ID"
exec srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 {flags} \\
    {python} -m finetune_assets.worker.node {arguments}
"""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """What the controller tells of a job.

    Attributes:
        name: Such as RUNNING.
        reason: Why it waits, or how it ended.
        nodes: Where it runs.
        start: When it is expected to start, or did.
        ran: For how many seconds it has run.
        preempted: Whether it had to make room for another.
        first: The node of its script, which Slurm goes on without where fewer nodes are enough.
    """

    name: str
    reason: str
    nodes: str = ""
    start: str = ""
    ran: int = 0
    preempted: bool = False
    first: str = ""

    @property
    def headless(self) -> bool:
        """Whether what is left of it waits for a machine that is lost."""
        return self.name == "RUNNING" and self.first not in _ask("scontrol", "show", "hostnames", self.nodes).split()


class SlurmLauncher:
    """Hands jobs to `sbatch` and follows them."""

    def run(self, spec: JobSpec, environment: Mapping[str, str]) -> ArtifactRef:
        """Run a job and wait for its artifact. If this process is ended meanwhile, so is the job.

        Args:
            spec: The job.
            environment: Added to this process's own, all of which the job is given.

        Raises:
            JobFailed: with the worker's own error, or with what Slurm did to it.
            UserError: if Slurm does not take it.
        """
        if not shutil.which("sbatch"):
            raise UserError("launcher.engine: 'slurm' needs sbatch, squeue, scontrol and scancel on this machine")
        name = f"finetune-{spec.makes}"
        self._cancel_former(name)
        remote = RemoteJob.begin(spec)
        try:
            folder = Path(os.environ.get("FINETUNE_SLURM_FOLDER") or Path(spec.cache) / "slurm")
            output = folder / f"{remote.id}.log"
            number = self._submit(spec, remote, name, output, environment)
            logger.info("Slurm has taken the job as %s; its output is %s", number, output)
            try:
                state = self._follow(number, output, remote)
            except BaseException:
                self._cancel(number)
                raise
            return _outcome(state, number, remote, spec)
        finally:
            remote.end()

    def _submit(self, spec: JobSpec, remote: RemoteJob, name: str, output: Path, environment: Mapping[str, str]) -> str:
        output.parent.mkdir(parents=True, exist_ok=True)
        given = {**os.environ, **spec.settings.environment, **environment}
        if "SLURM_JOB_ID" in given:  # Dagster itself runs in a job, whose options srun would take for its own
            given = {key: value for key, value in given.items() if not key.startswith("SLURM_") or key in OWN}
        command = ["sbatch", "--parsable", *arguments(spec, name, output)]
        done = subprocess.run(command, input=script(spec, remote), env=given, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip().split(";")[0]
        self._cancel_former(name)  # a controller that did not answer in time may have taken it
        raise _refused(spec, done.stderr)

    def _follow(self, number: str, output: Path, remote: RemoteJob) -> State:
        """Tell what the job does until it has ended."""
        told, pause, answered = "", POLL_SECONDS[0], time.monotonic()
        followed, lingering = Followed(output), _Lingering(remote)
        while True:
            followed.pass_on()
            state = state_of(number)
            if state and state.name in ENDED:
                followed.pass_on()
                return state
            if state:
                answered = time.monotonic()
                now = _waits(number, state)
                if now != told:
                    told = now
                    logger.info("Slurm's job %s: %s", number, told)
                if state.name == "PENDING" and state.reason in NEVER:
                    raise UserError(f"Slurm job {number} can never start ({state.reason}): {NEVER[state.reason]}")
                if state.headless:
                    logger.warning("Slurm's job %s has lost its first node, %s; cancelled", number, state.first)
                    self._cancel(number)
                    return State("NODE_FAIL", "BatchHost", state.first)
                if state.name == "RUNNING" and lingering.long():
                    logger.warning("Slurm's job %s has told how it ended, and has not ended; cancelled", number)
                    self._cancel(number)
                    return State("FAILED", "Lingering", state.nodes)
            elif time.monotonic() - answered > SILENT_SECONDS:
                raise JobFailed(f"Slurm's controller has not answered for {SILENT_SECONDS} s", retriable=True)
            time.sleep(pause)
            pause = min(pause * 1.05, POLL_SECONDS[1])

    def _cancel_former(self, name: str) -> None:
        """End what a run that was killed has left: it could never publish beside this one."""
        for number in _ask("squeue", "--me", "-h", "-o", "%i", "--name", name).split():
            logger.warning("Slurm's job %s of an earlier run makes the same; it is cancelled", number)
            self._cancel(number)

    def _cancel(self, number: str) -> None:
        deadline, told = time.monotonic() + CANCEL_SECONDS, False
        while time.monotonic() < deadline:
            told = told or subprocess.run(["scancel", number], capture_output=True).returncode == 0
            if _gone(number):
                return
            time.sleep(0.5)
        logger.warning("Slurm's job %s was cancelled and has not ended in %d s", number, CANCEL_SECONDS)


class _Lingering:
    """Whether a job goes on though its first machine has told how it ended; the store is asked now and then."""

    def __init__(self, remote: RemoteJob) -> None:
        self.remote, self.looked, self.ended = remote, 0.0, 0.0

    def long(self) -> bool:
        now = time.monotonic()
        if now - self.looked > LINGER_SECONDS / 2:
            self.looked = now
            self.ended = self.ended or (now if self.remote.has_ended() else 0)
        return bool(self.ended) and now - self.ended > LINGER_SECONDS


def arguments(spec: JobSpec, name: str, output: Path) -> list[str]:
    """sbatch's, from the settings."""
    asked, (least, most) = spec.settings, spec.nodes
    chosen = {  # no count of tasks: of a range of nodes, Slurm would then give the least
        "job-name": name,
        "nodes": f"{least}-{most}" if least < most else str(least),
        "output": output,
        "open-mode": "append",
        "export": "ALL",
        "signal": f"TERM@{GRACE_SECONDS}" if asked.time_limit else None,
        "time": asked.time_limit,
        "mem": asked.memory,
        "cpus-per-task": asked.cpus_per_node,
        "gpus-per-node": asked.gpus_per_node,
        "partition": asked.slurm.partition,
        "account": asked.slurm.account,
        "qos": asked.slurm.qos,
    }
    flags = [f"--{flag}={value}" for flag, value in chosen.items() if value is not None]
    # Begun anew by Dagster, which tells of it, and elsewhere; where fewer are enough, one that is lost ends nothing
    kept = ["--no-kill"] if least < most else []
    return [*flags, "--no-requeue", *kept, *asked.slurm.extra_arguments]


def script(spec: JobSpec, remote: RemoteJob) -> str:
    """What Slurm runs on the first node."""
    least, most = spec.nodes
    flags = ["--no-kill", "--kill-on-bad-exit=0"] if least < most else ["--kill-on-bad-exit=1"]
    if spec.settings.cpus_per_node:
        flags.append(f"--cpus-per-task={spec.settings.cpus_per_node}")  # srun does not take it from sbatch since 22.05
    python = shlex.quote(spec.settings.slurm.python or sys.executable)
    words = shlex.join((remote.store, remote.namespace, remote.id))
    return SCRIPT.format(flags=" ".join(flags), python=python, arguments=words)


def state_of(number: str) -> State | None:
    """What the controller says of a job; None if it does not answer."""
    done = subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True)
    if done.returncode != 0:
        return State("COMPLETED", "forgotten") if "Invalid job id" in done.stderr else None
    told = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", done.stdout))
    return State(
        told["JobState"],
        told.get("Reason", ""),
        told.get("NodeList", ""),
        told.get("StartTime", ""),
        seconds_of(told.get("RunTime", "")) or 0,
        told.get("PreemptTime", "None") != "None",
        told.get("BatchHost", ""),
    )


def _waits(number: str, state: State) -> str:
    if state.name != "PENDING":
        return f"{state.name} on {state.nodes}" if state.nodes not in ("", "(null)") else state.name
    queue = _ask("squeue", "-h", "-t", "PENDING", "--sort=-p,i", "-o", "%i").split()
    place = f", number {queue.index(number) + 1} of {len(queue)} that wait" if number in queue else ""
    expected = f", expected to start at {state.start}" if state.start.startswith("2") else ""
    return f"PENDING ({state.reason}){place}{expected}"


def _outcome(state: State, number: str, remote: RemoteJob, spec: JobSpec) -> ArtifactRef:
    """What was made, or why it was not.

    Raises:
        JobFailed: with the cause that is nearest to a person's.
    """
    found = remote.outcome()
    if isinstance(found, ArtifactRef):
        return found
    ended = _ended(state, spec, found)
    limit = f" {spec.settings.time_limit}" if spec.settings.time_limit else ""
    kept = "; the next run goes on from its last checkpoint" if spec.scratch else ""
    by_slurm = {
        "TIMEOUT": JobFailed(
            f"Slurm's job {number} has reached its time limit{limit}: raise launcher.time_limit{kept}"
        ),
        "NODE_FAIL": JobFailed(f"Slurm has lost a node of job {number} ({state.nodes}){kept}", retriable=True),
        "PREEMPTED": JobFailed(f"Slurm has taken the nodes of job {number} for another{kept}", retriable=True),
        "BOOT_FAIL": JobFailed(f"a node of Slurm's job {number} ({state.nodes}) did not start", retriable=True),
        "OUT_OF_MEMORY": JobFailed(
            f"Slurm's job {number} needed more memory than it was given: raise launcher.memory{kept}"
        ),
        "CANCELLED": JobFailed(f"Slurm's job {number} was cancelled{kept}"),
    }
    if ended in by_slurm:
        raise by_slurm[ended]
    raise found or JobFailed(
        f"Slurm's job {number} ended as {state.name} ({state.reason}), and no machine told why; see its output",
        retriable=True,
    )


def _ended(state: State, spec: JobSpec, found: JobFailed | None) -> str:
    """As what a job ended. One that obeys when it is told to end counts as failed for Slurm."""
    if state.name != "FAILED" or (found and found.telling >= 0):
        return state.name
    if state.preempted:
        return "PREEMPTED"
    limit = spec.settings.seconds
    return "TIMEOUT" if limit and state.ran >= limit - TOLD_SECONDS else state.name


def _refused(spec: JobSpec, said: str) -> UserError:
    asked, words = spec.settings, said.lower()
    for sign, told in REFUSED.items():
        if sign in words:
            partitions = ", ".join(dict.fromkeys(_ask("sinfo", "-h", "-o", "%R").split())) or "none"
            named = told.format(
                partition=asked.slurm.partition,
                partitions=partitions,
                account=asked.slurm.account,
                qos=asked.slurm.qos,
                time_limit=asked.time_limit,
                nodes=asked.nodes,
                cpus=asked.cpus_per_node,
            )
            return UserError(f"Slurm has refused the job. {named}")
    line = " ".join(said.split())
    if any(sign in words for sign in BUSY):
        return JobFailed(f"Slurm rejected the submission for now: {line}", retriable=True)
    return UserError(f"Slurm has refused the job: {line}")


def _gone(number: str) -> bool:
    state = state_of(number)
    return state is not None and state.name in ENDED


def _ask(*command: str) -> str:
    """What a command prints; nothing if it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout
