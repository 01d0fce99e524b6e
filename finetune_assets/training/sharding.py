"""A base model that is spread over all processes."""

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from finetune_assets.training.distributed import Process


def shard(root: nn.Module, layers: Iterable[nn.Module], trained: list[nn.Parameter], process: Process) -> None:
    """Keep one process's part of every frozen weight, and gather a layer while it is computed (FSDP2).

    The adapter's weights stay whole on every process, so that gradients, optimizer and checkpoints are those of plain
    data parallelism; the base is frozen, so nothing of it is ever reduced.

    Args:
        root: What is called in a step.
        layers: The model's layers, each gathered by itself.
        trained: The weights that stay whole.
        process: This process.
    """
    from torch.distributed.fsdp import fully_shard

    if process.world == 1:
        return
    mesh = init_device_mesh(process.device.type, (process.world,))
    whole = set(trained)
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, ignored_params=whole)
