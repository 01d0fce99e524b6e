"""This process among those that torchrun started."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """One of `world` processes that train together.

    Attributes:
        rank: From 0; rank 0 reports.
        world: How many there are.
        device: What this one computes on.
        local_world: How many of them are on this machine.
        local_rank: From 0, among those of this machine; the first of each writes checkpoints and output there. So each
            machine can go on without the others, and any can publish.
    """

    rank: int
    world: int
    device: torch.device
    local_world: int = 1
    local_rank: int = 0

    @property
    def writes(self) -> bool:
        return self.local_rank == 0

    @property
    def reports(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes; a process that computed none adds zeros.

        One flat buffer a step instead of DistributedDataParallel: an adapter's gradients are few, and no process has
        to compute as many micro-batches as another.
        """
        if self.world == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
        for parameter, part in zip(parameters, flat.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = part.view_as(parameter)

    def share_weights(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process rank 0's weights."""
        if self.world > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)

    def everyones(self, here: T) -> list[T]:
        """What each process has, by rank; plain data of some bytes."""
        found: list[T] = [here] * self.world
        if self.world > 1:
            dist.all_gather_object(found, here)
        return found

    def share(self, here: T, of: int = 0) -> T:
        """What one process has, given to all."""
        if self.world == 1:
            return here
        shared = [here]
        dist.broadcast_object_list(shared, src=of)
        return shared[0]

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; told between CPUs, so that no GPU is waited for."""
        if self.world == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[Process]:
    """Join the process group that torchrun announced (gloo without a GPU, NCCL with), and leave it at the end."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(rank, world, device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank)
    finally:
        if world > 1:
            dist.destroy_process_group()
