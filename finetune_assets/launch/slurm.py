"""Run jobs on Slurm through its command-line tools.

FINETUNE_SLURM_FOLDER: folder for the output of jobs, shared by this machine and the nodes; default `slurm` in
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
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.config.cluster import seconds_of
from finetune_assets.errors import UserError
from finetune_assets.launch.log_tail import Followed
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.modes import make_folders
from finetune_assets.worker.job import JobFailed, JobSpec
from finetune_assets.worker.remote import RemoteJob

POLL_SECONDS = 2.0, 15.0
"""Polling interval of a new and of a long-running job, in seconds. It grows because all users share the controller."""
GRACE_SECONDS = 60
"""Time before its limit at which a job gets SIGTERM and saves a checkpoint, in seconds."""
TOLD_SECONDS = GRACE_SECONDS + 60 + 15
"""Time before its limit at which a job that obeys SIGTERM may have ended, in seconds: Slurm may send the signal up to
60 s early."""
CANCEL_SECONDS = 120
"""Time for a cancelled job to end, in seconds. The cluster's KillWait defaults to 30 s."""
LINGER_SECONDS = 60
"""Time for a job to end after its first machine, in seconds. srun may wait indefinitely for a machine that died."""
SILENT_SECONDS = 600
"""Time for which the controller may be down, in seconds."""
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
    "REVOKED",
}  # fmt: skip
NEVER = {
    "PartitionTimeLimit": "launcher.time_limit exceeds the limit of the partition",
    "PartitionNodeLimit": "launcher.nodes exceeds the limit of the partition",
    "PartitionConfig": "the job requests more than the partition has: check launcher.nodes, launcher.time_limit and "
    "launcher.cpus_per_node",
    "BadConstraints": "no node has the requested resources: check launcher.gpus_per_node, launcher.memory and "
    "launcher.slurm.extra_arguments",
    "AccountNotAllowed": "launcher.slurm.account is not allowed to use the partition",
    "QOSNotAllowed": "launcher.slurm.qos is not allowed to use the partition",
    "InvalidAccount": "launcher.slurm.account does not exist",
    "InvalidQOS": "launcher.slurm.qos does not exist",
    "AssocMaxNodePerJobLimit": "launcher.nodes exceeds the limit of the account",
    "QOSMaxNodePerJobLimit": "launcher.nodes exceeds the limit of the quality of service",
    "QOSMaxWallDurationPerJobLimit": "launcher.time_limit exceeds the limit of the quality of service",
    "AssocMaxWallDurationPerJobLimit": "launcher.time_limit exceeds the limit of the account",
}
"""Pending reasons of jobs that can never start, and the setting to change."""
REFUSED = {
    "invalid partition": "launcher.slurm.partition: '{partition}' does not exist; this cluster has: {partitions}",
    "invalid account": "launcher.slurm.account: you are not allowed to use '{account}'",
    "invalid qos": "launcher.slurm.qos: you are not allowed to use '{qos}'",
    "invalid generic resource": "launcher.gpus_per_node: Slurm has no GPUs configured in this cluster (GresTypes)",
    "invalid time limit": "launcher.time_limit: '{time_limit}' is not a valid time limit in Slurm",
    "time limit exceed": "launcher.time_limit: '{time_limit}' exceeds the limit of the partition",
    "requested time limit is invalid": "launcher.time_limit: '{time_limit}' exceeds the limit of the partition",
    "node count specification invalid": "launcher.nodes: '{nodes}' exceeds the number of nodes in the partition",
    "node configuration is not available": "no node of this cluster has the GPUs, cores and memory set in launcher",
    "more processors requested than permitted": "launcher.cpus_per_node: {cpus} exceeds the number of cores of a node",
}
"""Parts of `sbatch` errors for jobs that can never run, and the error message that names the setting."""
BUSY = (
    "maxsubmit", "job submit limit", "temporarily unable", "resource temporarily unavailable", "unable to contact",
    "timed out", "connection refused", "communication", "zero bytes",
)  # fmt: skip
"""Parts of `sbatch` errors that are transient."""
OWN = ("SLURM_CONF", "SLURM_JWT")
"""Slurm's environment variables that select the cluster and authenticate the user."""
SCRIPT = """#!/bin/sh
{variables}
export FINETUNE_HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))"
export FINETUNE_MEETING="$SLURM_JOB_ID"
exec srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 {flags} \\
    {python} -m finetune_assets.worker.node {arguments}
"""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobState:
    """State of a job, as reported by the controller.

    Attributes:
        name: Name of the state, such as RUNNING.
        reason: Reason for which the job is pending, or for its end.
        nodes: Nodes on which the job runs.
        start: Expected or actual start time.
        ran: Run time, in seconds.
        preempted: Whether the job was preempted.
        first: Node that runs the batch script. A job with a range of nodes continues when it loses this node.
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
        """Whether the job has lost its first node, so that the remaining nodes wait for it."""
        return self.name == "RUNNING" and self.first not in _stdout("scontrol", "show", "hostnames", self.nodes).split()


class SlurmEngine:
    """Submits jobs with `sbatch` and monitors them."""

    is_remote = True

    def run(self, spec: JobSpec, environment: Mapping[str, str]) -> ArtifactRef:
        """Run a job and wait for its artifact. Terminating this process cancels the job.

        Args:
            spec: The job.
            environment: Variables added to the environment of this process; the job inherits both.

        Raises:
            JobFailed: with the error that the worker reported, or the reason for which Slurm ended the job.
            UserError: if Slurm rejects the job.
        """
        if not shutil.which("sbatch"):
            raise UserError("launcher.engine: 'slurm' requires sbatch, squeue, scontrol and scancel on this machine")
        name = f"finetune-{spec.makes}"
        self._cancel_former(name)
        remote = RemoteJob.begin(spec)
        try:
            folder = Path(os.environ.get("FINETUNE_SLURM_FOLDER") or Path(spec.cache) / "slurm")
            output = folder / f"{remote.id}.log"
            number = self._submit(spec, remote, name, output, environment)
            logger.info("Submitted Slurm job %s; output: %s", number, output)
            try:
                state = self._follow(number, output, remote)
            except BaseException:
                self._cancel(number)
                raise
            return _outcome(state, number, remote, spec)
        finally:
            remote.end()

    def _submit(self, spec: JobSpec, remote: RemoteJob, name: str, output: Path, environment: Mapping[str, str]) -> str:
        make_folders(output.parent)
        given = {**os.environ, **environment}  # not the settings' own, such as PATH or LD_PRELOAD: for the job alone
        if "SLURM_JOB_ID" in given:  # Dagster itself runs in a job; srun would apply the options of that job
            given = {key: value for key, value in given.items() if not key.startswith("SLURM_") or key in OWN}
        command = ["sbatch", "--parsable", *arguments(spec, name, output)]
        done = subprocess.run(
            command, input=script(spec, remote, environment), env=given, capture_output=True, text=True
        )
        if done.returncode == 0:
            return done.stdout.strip().split(";")[0]
        self._cancel_former(name)  # a controller that timed out may still have accepted the job
        raise _rejection(spec, done.stderr)

    def _follow(self, number: str, output: Path, remote: RemoteJob) -> JobState:
        """Log state changes and forward the output of a job until it ends, and return its final state."""
        description, pause, answered = "", POLL_SECONDS[0], time.monotonic()
        followed, lingering = Followed(output), _Lingering(remote)
        while True:
            followed.pass_on()
            state = state_of(number)
            if state and state.name in ENDED:
                followed.pass_on()
                return state
            if state:
                answered = time.monotonic()
                current = _describe(number, state)
                if current != description:
                    description = current
                    logger.info("Slurm job %s: %s", number, description)
                if state.name == "PENDING" and state.reason in NEVER:
                    raise UserError(f"Slurm job {number} can never start ({state.reason}): {NEVER[state.reason]}")
                if state.headless:
                    logger.warning("Cancelling Slurm job %s: it has lost its first node, %s", number, state.first)
                    self._cancel(number)
                    return JobState("NODE_FAIL", "BatchHost", state.first)
                if state.name == "RUNNING" and lingering.long():
                    logger.warning("Cancelling Slurm job %s: it reported its result but has not ended", number)
                    self._cancel(number)
                    return JobState("FAILED", "Lingering", state.nodes)
            elif time.monotonic() - answered > SILENT_SECONDS:
                raise JobFailed(f"the Slurm controller has not responded for {SILENT_SECONDS} s", retriable=True)
            time.sleep(pause)
            pause = min(pause * 1.05, POLL_SECONDS[1])

    def _cancel_former(self, name: str) -> None:
        """Cancel jobs left by a killed run, so that they do not compete with this run to publish the artifact."""
        for number in _stdout("squeue", "--me", "-h", "-o", "%i", "--name", name).split():
            logger.warning("Cancelling Slurm job %s of an earlier run for the same artifact", number)
            self._cancel(number)

    def _cancel(self, number: str) -> None:
        deadline, requested = time.monotonic() + CANCEL_SECONDS, False
        while time.monotonic() < deadline:
            requested = requested or subprocess.run(["scancel", number], capture_output=True).returncode == 0
            if _has_ended(number):
                return
            time.sleep(0.5)
        logger.warning("Cancelled Slurm job %s has not ended after %d s", number, CANCEL_SECONDS)


class _Lingering:
    """Detects jobs that keep running after their first machine has reported its result, by polling the store."""

    def __init__(self, remote: RemoteJob) -> None:
        self.remote, self.looked, self.ended = remote, 0.0, 0.0

    def long(self) -> bool:
        now = time.monotonic()
        if now - self.looked > LINGER_SECONDS / 2:
            self.looked = now
            self.ended = self.ended or (now if self.remote.has_ended() else 0)
        return bool(self.ended) and now - self.ended > LINGER_SECONDS


def arguments(spec: JobSpec, name: str, output: Path) -> list[str]:
    """Build the arguments of `sbatch` from the settings."""
    settings, (least, most) = spec.settings, spec.nodes
    options = {  # no number of tasks: with one, Slurm allocates the minimum of a range of nodes
        "job-name": name,
        "nodes": f"{least}-{most}" if least < most else str(least),
        "output": output,
        "open-mode": "append",
        "export": "ALL",
        "signal": f"TERM@{GRACE_SECONDS}" if settings.time_limit else None,
        "time": settings.time_limit,
        "mem": settings.memory,
        "cpus-per-task": settings.cpus_per_node,
        "gpus-per-node": settings.gpus_per_node,
        "partition": settings.slurm.partition,
        "account": settings.slurm.account,
        "qos": settings.slurm.qos,
    }
    flags = [f"--{flag}={value}" for flag, value in options.items() if value is not None]
    # Dagster retries failed jobs itself: it logs the retry, and may use other nodes. Elastic jobs survive a lost node
    elastic = ["--no-kill"] if least < most else []
    return [*flags, "--no-requeue", *elastic, *settings.slurm.extra_arguments]


def script(spec: JobSpec, remote: RemoteJob, kept: Container[str] = ()) -> str:
    """Build the batch script that Slurm runs on the first node.

    Args:
        spec: The job. The script sets its `launcher.environment`, so that nothing on this machine does.
        remote: Location of the job in the store.
        kept: Names of variables that the job inherits from `sbatch`, and that `launcher.environment` does not replace.
    """
    least, most = spec.nodes
    flags = ["--no-kill", "--kill-on-bad-exit=0"] if least < most else ["--kill-on-bad-exit=1"]
    if spec.settings.cpus_per_node:
        # Since Slurm 22.05, srun does not inherit it from sbatch
        flags.append(f"--cpus-per-task={spec.settings.cpus_per_node}")
    python = shlex.quote(spec.settings.slurm.python or sys.executable)
    location = shlex.join(remote.arguments)
    own = {name: value for name, value in spec.settings.environment.items() if name not in kept}
    variables = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in own.items())
    return SCRIPT.format(variables=variables, flags=" ".join(flags), python=python, arguments=location)


def state_of(number: str) -> JobState | None:
    """Return the state of a job, or None if the controller does not respond."""
    done = subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True)
    if done.returncode != 0:
        return JobState("COMPLETED", "forgotten") if "Invalid job id" in done.stderr else None
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", done.stdout))
    return JobState(
        fields["JobState"],
        fields.get("Reason", ""),
        fields.get("NodeList", ""),
        fields.get("StartTime", ""),
        seconds_of(fields.get("RunTime", "")) or 0,
        fields.get("PreemptTime", "None") != "None",
        fields.get("BatchHost", ""),
    )


def _describe(number: str, state: JobState) -> str:
    if state.name != "PENDING":
        return f"{state.name} on {state.nodes}" if state.nodes not in ("", "(null)") else state.name
    queue = _stdout("squeue", "-h", "-t", "PENDING", "--sort=-p,i", "-o", "%i").split()
    position = f", position {queue.index(number) + 1} of {len(queue)} in the queue" if number in queue else ""
    expected = f", expected to start at {state.start}" if state.start.startswith("2") else ""
    return f"PENDING ({state.reason}){position}{expected}"


def _outcome(state: JobState, number: str, remote: RemoteJob, spec: JobSpec) -> ArtifactRef:
    """Return the artifact of a job that has ended.

    Raises:
        JobFailed: with the most specific cause that is known.
    """
    outcome = remote.outcome()
    if isinstance(outcome, ArtifactRef):
        return outcome
    ended = _final_state(state, spec, outcome)
    limit = f" {spec.settings.time_limit}" if spec.settings.time_limit else ""
    resume = "; the next run resumes from its last checkpoint" if spec.scratch else ""
    by_slurm = {
        "TIMEOUT": JobFailed(f"Slurm job {number} reached its time limit{limit}: raise launcher.time_limit{resume}"),
        "NODE_FAIL": JobFailed(f"Slurm job {number} lost a node ({state.nodes}){resume}", retriable=True),
        "PREEMPTED": JobFailed(f"Slurm job {number} was preempted{resume}", retriable=True),
        "BOOT_FAIL": JobFailed(f"Slurm job {number}: a node failed to boot ({state.nodes})", retriable=True),
        "OUT_OF_MEMORY": JobFailed(f"Slurm job {number} ran out of memory: raise launcher.memory{resume}"),
        "CANCELLED": JobFailed(f"Slurm job {number} was cancelled{resume}"),
    }
    if ended in by_slurm:
        raise by_slurm[ended]
    raise outcome or JobFailed(
        f"Slurm job {number} ended as {state.name} ({state.reason}), and no node reported an error; check its output",
        retriable=True,
    )


def _final_state(state: JobState, spec: JobSpec, failure: JobFailed | None) -> str:
    """Return the state in which a job ended. Slurm reports a job that obeys SIGTERM as FAILED."""
    if state.name != "FAILED" or (failure and failure.specificity >= 0):
        return state.name
    if state.preempted:
        return "PREEMPTED"
    limit = spec.settings.seconds
    return "TIMEOUT" if limit and state.ran >= limit - TOLD_SECONDS else state.name


def _rejection(spec: JobSpec, stderr: str) -> UserError:
    settings, lowercase = spec.settings, stderr.lower()
    for sign, template in REFUSED.items():
        if sign in lowercase:
            partitions = ", ".join(dict.fromkeys(_stdout("sinfo", "-h", "-o", "%R").split())) or "none"
            reason = template.format(
                partition=settings.slurm.partition,
                partitions=partitions,
                account=settings.slurm.account,
                qos=settings.slurm.qos,
                time_limit=settings.time_limit,
                nodes=settings.nodes,
                cpus=settings.cpus_per_node,
            )
            return UserError(f"Slurm rejected the job. {reason}")
    line = " ".join(stderr.split())
    if any(sign in lowercase for sign in BUSY):
        return JobFailed(f"Slurm temporarily rejected the job: {line}", retriable=True)
    return UserError(f"Slurm rejected the job: {line}")


def _has_ended(number: str) -> bool:
    state = state_of(number)
    return state is not None and state.name in ENDED


def _stdout(*command: str) -> str:
    """Run a command and return its standard output; the exit code is ignored."""
    return subprocess.run(command, capture_output=True, text=True).stdout
