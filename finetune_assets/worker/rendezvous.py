"""Rendezvous of the machines of a job: the role of each machine, and torchrun's arguments."""

import os
from dataclasses import dataclass

RESTARTS = 3
"""How often the remaining machines restart, if fewer than the maximum number of machines are enough."""
LATECOMER_SECONDS = 30
"""How long the machines wait for more machines once the minimum has joined."""


@dataclass(frozen=True)
class Place:
    """Role of a machine in a job.

    Attributes:
        node: Number of the machine. Machine 0 is the leader, whose bootstrap publishes the output.
        head: Host and port of torchrun's rendezvous, on the leader; empty for a single machine.
        job: Rendezvous ID, which distinguishes rendezvous at the same host and port.
        address: Address of this machine for the other machines; empty for its host name.
    """

    node: int = 0
    head: str = ""
    job: str = ""
    address: str = ""

    @classmethod
    def from_environment(cls) -> "Place":
        """Read the role from FINETUNE_NODE, FINETUNE_HEAD, FINETUNE_MEETING and FINETUNE_ADDRESS, set by the engine."""
        get = os.environ.get
        node = int(get("FINETUNE_NODE") or get("SLURM_PROCID") or get("JOB_COMPLETION_INDEX") or 0)
        head, job, address = (get(f"FINETUNE_{name}") or "" for name in ("HEAD", "MEETING", "ADDRESS"))
        return cls(node, head, job, address)

    @property
    def leads(self) -> bool:
        return self.node == 0

    def own(self, name: str) -> str:
        """Return a name unique to this machine, for files in a cache that the machines may share."""
        return name if self.leads else f"{name}-node{self.node}"

    def meeting(self, nodes: tuple[int, int], seconds: int) -> list[str]:
        """Return torchrun's rendezvous arguments.

        Args:
            nodes: Minimum and maximum number of machines.
            seconds: How long to wait for the minimum number of machines.
        """
        if nodes == (1, 1) or not self.head:
            return ["--standalone"]
        least, most = nodes
        conf = {
            "is_host": int(self.leads),
            "join_timeout": seconds,
            "read_timeout": seconds,
            "last_call_timeout": LATECOMER_SECONDS,
        }
        return [
            f"--nnodes={least}:{most}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.head}",
            f"--rdzv-id={self.job}",
            f"--rdzv-conf={','.join(f'{name}={value}' for name, value in conf.items())}",
            f"--max-restarts={RESTARTS if least < most else 0}",
            *([f"--local-addr={self.address}"] if self.address else []),
        ]


ALONE = Place()
