"""This process among those that torchrun started."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Process:
    """One of `world` processes that train together.

    Attributes:
        rank: From 0; rank 0 reports and writes.
        world: How many there are.
        device: What this one computes on.
        local_world: How many of them are on this machine.
    """

    rank: int
    world: int
    device: torch.device
    local_world: int = 1

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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(rank, world, device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    finally:
        if world > 1:
            dist.destroy_process_group()
