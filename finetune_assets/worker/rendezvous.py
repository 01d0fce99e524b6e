"""One machine among those that work on a job together, and where their processes meet."""

import os
from dataclasses import dataclass

RESTARTS = 3
"""How often the machines that are left begin anew with one another, where fewer than the most are enough."""
LATECOMER_SECONDS = 30
"""How long those who are enough wait for more."""


@dataclass(frozen=True)
class Place:
    """A machine's place in a job.

    Attributes:
        node: Its number; 0 leads: its bootstrap publishes what is made.
        head: Host and port where torchrun's agents meet, on the machine that leads; empty where there is only one.
        job: Tells this meeting from others at the same place.
        address: Where the others reach this machine; empty for its host name.
    """

    node: int = 0
    head: str = ""
    job: str = ""
    address: str = ""

    @classmethod
    def from_environment(cls) -> "Place":
        """As an engine has said it in FINETUNE_NODE, FINETUNE_HEAD, FINETUNE_MEETING and FINETUNE_ADDRESS."""
        said = os.environ.get
        node = int(said("FINETUNE_NODE") or said("SLURM_PROCID") or said("JOB_COMPLETION_INDEX") or 0)
        head, job, address = (said(f"FINETUNE_{name}") or "" for name in ("HEAD", "MEETING", "ADDRESS"))
        return cls(node, head, job, address)

    @property
    def leads(self) -> bool:
        return self.node == 0

    def own(self, name: str) -> str:
        """A name that no other machine of the job has, for what lies in a cache that they may share."""
        return name if self.leads else f"{name}-node{self.node}"

    def meeting(self, nodes: tuple[int, int], seconds: int) -> list[str]:
        """torchrun's arguments.

        Args:
            nodes: Least and most machines.
            seconds: How long to wait for the least.
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
