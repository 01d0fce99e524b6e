"""Where jobs run, and what they ask of a cluster."""

import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")


@dataclass
class SlurmJob:
    """What only Slurm is told."""

    partition: str | None = None
    """Partition; `null` takes the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    python: str | None = None
    """Python on the nodes, with this project installed; `null` takes the path of the one that runs here."""
    extra_arguments: list[str] = field(default_factory=list)
    """More of `sbatch`'s arguments, such as `--constraint=h100`; they win over those that are set here."""


@dataclass
class KubernetesJob:
    """What only Kubernetes is told."""

    image: str | None = None
    """Container image; `null` takes FINETUNE_IMAGE."""
    namespace: str | None = None
    """Namespace of the pods; `null` takes FINETUNE_KUBERNETES_NAMESPACE, or else `default`."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Taints of nodes that are borne, as Kubernetes writes them."""
    service_account: str | None = None
    """Service account, which may stand for a role that reads and writes the store; `null` takes
    FINETUNE_SERVICE_ACCOUNT."""
    secrets: list[str] = field(default_factory=list)
    """Names of secrets whose keys become environment variables of the job; their values are never read here."""
    shared_memory: str = "8Gi"
    """Size of `/dev/shm`, through which processes on one GPU node exchange data."""
    queue: str | None = None
    """Queue of Kueue (its label `kueue.x-k8s.io/queue-name`)."""
    pod: dict[str, Any] = field(default_factory=dict)
    """More of the pod's specification, as Kubernetes writes it; it wins over what is set here."""


@dataclass
class Launcher:
    """Where the jobs of an experiment run. What is computed is the same everywhere."""

    engine: Literal["auto", "local", "slurm", "kubernetes"] = "auto"
    """`auto` takes FINETUNE_LAUNCHER, or else `local`: the machine that Dagster runs on."""
    nodes: str = "1"
    """Machines that train together: a number, or least and most as `1-4`, where a training may begin with fewer and go
    on with those that are left. How many processes each runs is `training.processes_per_node`."""
    gpus_per_node: int | None = None
    """GPUs of each machine; `null` asks for none."""
    cpus_per_node: int | None = None
    """CPU cores of each machine; `null` leaves it to the cluster."""
    memory: str | None = None
    """Main memory of each machine, such as `64G`; `null` leaves it to the cluster."""
    time_limit: str | None = None
    """The longest that a job may run, as `hours:minutes:seconds` or `days-hours:minutes:seconds`."""
    rendezvous_seconds: int = 600
    """How long the machines of a job wait for one another."""
    environment: dict[str, str] = field(default_factory=dict)
    """More environment variables of the job, such as `NCCL_SOCKET_IFNAME: eth0`. No secrets: they are kept with what is
    made."""
    slurm: SlurmJob = field(default_factory=SlurmJob)
    """What only Slurm is told."""
    kubernetes: KubernetesJob = field(default_factory=KubernetesJob)
    """What only Kubernetes is told."""

    @property
    def node_range(self) -> tuple[int, int]:
        """Least and most machines."""
        least, _, most = self.nodes.partition("-")
        return int(least), int(most or least)

    @property
    def seconds(self) -> int | None:
        """The time limit."""
        return seconds_of(self.time_limit or "")


def seconds_of(said: str) -> int | None:
    """Of `hours:minutes:seconds` or `days-hours:minutes:seconds`; None of anything else."""
    found = TIME_LIMIT.fullmatch(said)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return int(timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds())
