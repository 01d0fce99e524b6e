"""Process group of the processes started by torchrun, and collective operations on it."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_assets.worker.rendezvous import RANKS_FILE

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process in a group of `world` processes that train together.

    Attributes:
        rank: Global rank, from 0; rank 0 reports.
        world: Number of processes.
        device: Device of this process.
        local_world: Number of processes on this machine.
        local_rank: Rank on this machine, from 0. Local rank 0 writes checkpoints and output on each machine, so each
            machine can resume without the others, and any can publish.
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
        """Sum a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sum the gradients over all processes; a process without gradients contributes zeros.

        Uses one flat buffer per step instead of DistributedDataParallel: an adapter has few gradients, and processes
        may compute different numbers of micro-batches.
        """
        if self.world == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
        for parameter, part in zip(parameters, flat.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = part.view_as(parameter)

    def share_weights(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Broadcast the weights of rank 0 to all processes."""
        if self.world > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)

    def everyones(self, here: T) -> list[T]:
        """Gather a small JSON-serializable value from each process, in rank order.

        Values are sent as JSON, because PyTorch's collectives of objects unpickle what they receive.
        """
        content = _encoded(here)
        if self.world == 1:
            return [_decoded(content)]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(content)]))
        longest = max(int(size) for size in sizes)
        received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(received, _as_tensor(content.ljust(longest)))
        return [_decoded(_as_bytes(values)[: int(size)]) for values, size in zip(received, sizes, strict=True)]

    def share(self, here: T, of: int = 0) -> T:
        """Broadcast a JSON-serializable value of rank `of` to all processes."""
        value: T = _decoded(self.share_bytes(_encoded(here), of))
        return value

    def share_bytes(self, here: bytes, of: int = 0) -> bytes:
        """Broadcast the bytes of rank `of` to all processes."""
        if self.world == 1:
            return here
        size = torch.tensor([len(here)])
        dist.broadcast(size, src=of)
        content = _as_tensor(here) if self.rank == of else torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(content, src=of)
        return _as_bytes(content)

    def any(self, here: bool) -> bool:
        """Whether the flag is true in any process; reduced on the CPU, so it does not wait for a GPU."""
        if self.world == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def _decoded(content: bytes) -> Any:
    return json.loads(content)


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)


def _as_bytes(values: Tensor) -> bytes:
    return values.numpy().tobytes()


@contextmanager
def joined() -> Iterator[DistributedContext]:
    """Join the process group defined by torchrun (gloo on CPUs, NCCL on GPUs), and leave it on exit."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if file := os.environ.get(RANKS_FILE):  # on one machine: no TCP store, which would listen on all interfaces
            dist.init_process_group(backend, store=dist.FileStore(file, world), rank=rank, world_size=world)
        else:
            dist.init_process_group(backend)
    try:
        yield DistributedContext(rank, world, device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank)
    finally:
        if world > 1:
            dist.destroy_process_group()
