"""Sharding of the base model over all processes (FSDP2)."""

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from finetune_assets.training.distributed import DistributedContext


def shard(
    root: nn.Module, layers: Iterable[nn.Module], trained: list[nn.Parameter], process: DistributedContext
) -> None:
    """Shard every frozen weight over all processes; each layer is gathered while it is computed.

    The adapter's weights are replicated on every process, so gradients, optimizer and checkpoints are the same as in
    plain data parallelism. The base model is frozen, so its gradients are never reduced.

    Weights are moved to the device of the process one layer at a time, so the device does not need to hold the whole
    model.

    Args:
        root: Module that is called in a step, through `forward` or `logits`.
        layers: Layers of the model, each gathered separately.
        trained: Trained weights, which are not sharded.
        process: This process.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(process.device.type, (process.world,))
    for parameter in trained:
        parameter.data = parameter.data.to(process.device)
    whole = set(trained)
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, ignored_params=whole, reshard_after_forward=True)  # not the default for the root
    register_fsdp_forward_method(root, "logits")


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the weights stored in this process."""
    parts = (getattr(parameter, "to_local", lambda own=parameter: own)() for parameter in model.parameters())
    return sum(part.nbytes for part in parts)
