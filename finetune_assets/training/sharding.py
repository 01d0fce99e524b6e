"""A base model that is spread over all processes."""

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from finetune_assets.training.distributed import Process


def shard(root: nn.Module, layers: Iterable[nn.Module], trained: list[nn.Parameter], process: Process) -> None:
    """Keep one process's part of every frozen weight, and gather a layer while it is computed (FSDP2).

    The adapter's weights stay whole on every process, so that gradients, optimizer and checkpoints are those of plain
    data parallelism; the base is frozen, so nothing of it is ever reduced.

    Weights are moved to the process's device a layer at a time, so the whole model need not fit it.

    Args:
        root: What is called in a step, by itself or its `logits`.
        layers: The model's layers, each gathered by itself.
        trained: The weights that stay whole.
        process: This process.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(process.device.type, (process.world,))
    for parameter in trained:
        parameter.data = parameter.data.to(process.device)
    whole = set(trained)
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, ignored_params=whole, reshard_after_forward=True)  # the root would not
    register_fsdp_forward_method(root, "logits")


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the weights that this process keeps."""
    parts = (getattr(parameter, "to_local", lambda own=parameter: own)() for parameter in model.parameters())
    return sum(part.nbytes for part in parts)
