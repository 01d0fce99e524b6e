"""Settings of where jobs run and of the cluster resources that they request."""

import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from finetune_assets.config.fields import IN_FILE_ONLY

ENGINES = {
    "local": "finetune_assets.launch.local:LocalEngine",
    "slurm": "finetune_assets.launch.slurm:SlurmEngine",
    "kubernetes": "finetune_assets.launch.kubernetes:KubernetesEngine",
}
"""The registry of engines: module and class of each, imported when it runs a job."""
AUTO = "auto"
TIME_LIMIT = re.compile(r"(?:([0-9]{1,6})-)?([0-9]{1,6}):([0-5][0-9]):([0-5][0-9])")


@dataclass
class SlurmJob:
    """Settings for Slurm only."""

    partition: str | None = None
    """Partition; `null` uses the cluster's default."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    python: str | None = field(default=None, metadata=IN_FILE_ONLY)
    """Path of a Python with this project on the nodes; `null` uses the path of the current one."""
    extra_arguments: list[str] = field(default_factory=list, metadata=IN_FILE_ONLY)
    """Additional arguments of `sbatch`, such as `--constraint=h100`; they override the others."""


@dataclass
class KubernetesJob:
    """Settings for Kubernetes only."""

    image: str | None = field(default=None, metadata=IN_FILE_ONLY)
    """Container image; `null` uses FINETUNE_IMAGE."""
    namespace: str | None = field(default=None, metadata=IN_FILE_ONLY)
    """Namespace of the pods; `null` uses FINETUNE_KUBERNETES_NAMESPACE, or `default`."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Required node labels."""
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Tolerations, in Kubernetes' format."""
    service_account: str | None = field(default=None, metadata=IN_FILE_ONLY)
    """Service account, for example with a role that may read and write the store; `null` uses
    FINETUNE_SERVICE_ACCOUNT."""
    secrets: list[str] = field(default_factory=list, metadata=IN_FILE_ONLY)
    """Names of secrets whose keys become environment variables of the job; their values are never read by Dagster."""
    shared_memory: str = "8Gi"
    """Size of `/dev/shm`, which the processes of a node use to exchange data."""
    queue: str | None = None
    """Kueue queue (label `kueue.x-k8s.io/queue-name`)."""
    pod: dict[str, Any] = field(default_factory=dict, metadata=IN_FILE_ONLY)
    """Additional pod specification, in Kubernetes' format; it overrides the other settings."""


@dataclass
class LauncherSettings:
    """Where the jobs of an experiment run. Results are the same everywhere."""

    engine: str = "auto"
    """`local`, the machine that Dagster runs on, `slurm` or `kubernetes`; `auto` uses FINETUNE_LAUNCHER, or `local`."""
    nodes: str = "1"
    """Number of machines, or a range such as `1-4`: an elastic training starts with fewer machines and continues with
    those that remain. `training.processes_per_node` sets the processes of each."""
    gpus_per_node: int | None = None
    """GPUs per machine; `null` requests none."""
    cpus_per_node: int | None = None
    """CPU cores per machine; `null` uses the cluster's default."""
    memory: str | None = None
    """Memory per machine, such as `64G`; `null` uses the cluster's default."""
    time_limit: str | None = None
    """Time limit of a job, as `hours:minutes:seconds` or `days-hours:minutes:seconds`."""
    rendezvous_seconds: int = 600
    """Time that the machines of a job wait for each other, in seconds."""
    environment: dict[str, str] = field(default_factory=dict, metadata=IN_FILE_ONLY)
    """Additional environment variables of the job on Slurm and Kubernetes, such as `NCCL_SOCKET_IFNAME: eth0`. They are
    not set for `sbatch` on Dagster's machine. Not for secrets: settings are stored with artifacts."""
    slurm: SlurmJob = field(default_factory=SlurmJob)
    """Settings for Slurm only."""
    kubernetes: KubernetesJob = field(default_factory=KubernetesJob)
    """Settings for Kubernetes only."""

    @property
    def node_range(self) -> tuple[int, int]:
        """Minimum and maximum number of machines."""
        least, _, most = self.nodes.partition("-")
        return int(least), int(most or least)

    @property
    def seconds(self) -> int | None:
        """The time limit in seconds; None if it is not set."""
        return seconds_of(self.time_limit or "")


def seconds_of(duration: str) -> int | None:
    """Parse `hours:minutes:seconds` or `days-hours:minutes:seconds` to seconds; None for any other format."""
    match = TIME_LIMIT.fullmatch(duration)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return int(timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds())
