"""Rendezvous of the processes of a job: the role of each machine, torchrun's arguments, and the addresses in use.

torchrun unpickles its rendezvous state. On one machine the state is a file that only this user can access, and ranks
connect on loopback: no port is open to the network. Several machines connect through torchrun's TCP store, which does
not authenticate its clients: their network must be closed to everybody else (docs/clusters.md).
"""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

RESTARTS = 3
"""How often the remaining machines restart, if fewer than the maximum number of machines are enough."""
LATECOMER_SECONDS = 30
"""How long the machines wait for more machines once the minimum has joined."""
RANKS_FILE = "FINETUNE_RANKS_FILE"
"""Environment variable: file through which the ranks of a job on one machine find each other."""


@dataclass(frozen=True)
class Meeting:
    """How torchrun and its ranks find each other.

    Attributes:
        arguments: torchrun's rendezvous arguments.
        environment: Environment variables of torchrun and the ranks, which override all others.
    """

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)


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

    def meeting(self, nodes: tuple[int, int], seconds: int, folder: Path) -> Meeting:
        """Return the rendezvous of this machine's processes.

        Args:
            nodes: Minimum and maximum number of machines.
            seconds: How long to wait for the minimum number of machines.
            folder: Folder of the job on this machine.
        """
        if nodes == (1, 1) or not self.head:
            return _on_one_machine(folder)
        least, most = nodes
        conf = {
            "is_host": int(self.leads),
            "join_timeout": seconds,
            "read_timeout": seconds,
            "last_call_timeout": LATECOMER_SECONDS,
        }
        return Meeting(
            [
                f"--nnodes={least}:{most}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={self.head}",
                f"--rdzv-id={self.job}",
                f"--rdzv-conf={','.join(f'{name}={value}' for name, value in conf.items())}",
                f"--max-restarts={RESTARTS if least < most else 0}",
                *([f"--local-addr={self.address}"] if self.address else []),
            ]
        )


def _on_one_machine(folder: Path) -> Meeting:
    """Return a rendezvous through files, without a TCP store, whose ranks listen on loopback only."""
    private = folder / "rendezvous"
    private.mkdir(mode=0o700)
    arguments = [
        "--nnodes=1",
        "--rdzv-backend=c10d",
        "--rdzv-conf=store_type=file",
        f"--rdzv-endpoint={private / 'agent'}",
        "--local-addr=127.0.0.1",
    ]
    interface = loopback()
    environment = {
        RANKS_FILE: str(private / "ranks"),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # no TCP store of the agent, which would listen on all interfaces
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    return Meeting(arguments, environment)


def loopback() -> str:
    """Return the name of the loopback interface: `lo` on Linux, `lo0` on macOS."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


ALONE = Place()
