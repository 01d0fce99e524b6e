"""How much memory a training needs, measured on a few tokens, and what to do where there is not enough."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.errors import UserError
from finetune_assets.training.batches import Batch
from finetune_assets.training.telemetry import peak_memory_mib

GIB = 1 << 30
RESERVE = 0.9
"""Share of the free memory that is planned with; allocators lose some to gaps."""
TRAINED_BYTES = 4 * 4
"""A trained weight's gradient, its copy for the sum over processes, and AdamW's two moments, in float32."""


class OutOfMemory(UserError):
    """The device has too little memory for these settings."""


@dataclass(frozen=True)
class Estimate:
    """Memory that training takes beside the model.

    Attributes:
        activations: Bytes that one token keeps from the forward for the backward pass.
        fixed: Bytes of gradients and optimizer.
        free: Bytes that were free.
        tokens: Tokens of a full micro-batch.
        checkpointing: Whether activations are computed twice.
    """

    activations: float
    fixed: int
    free: int
    tokens: int
    checkpointing: bool = False

    @property
    def needed(self) -> float:
        return self.fixed + self.activations * self.tokens

    @property
    def fits(self) -> bool:
        return self.needed <= RESERVE * self.free

    def describe(self) -> str:
        return (
            f"activations {self.activations * self.tokens / GIB:.2f} GiB a micro-batch of {self.tokens:,} tokens, "
            f"{self.free / GIB:.1f} GiB free"
        )


def estimate(
    loss: Callable[[Batch], Tensor],
    batches: tuple[Batch, Batch],
    tokens: int,
    model: nn.Module,
    device: torch.device,
    sharing: int,
    checkpointing: bool,
) -> Estimate:
    """Measure what a token keeps, as the difference that more tokens make; weights that are kept too cancel out.

    Args:
        loss: Computes the loss of a micro-batch.
        batches: Two micro-batches, the second with more tokens.
        tokens: Tokens of the largest micro-batch there will be.
        model: The model.
        device: Where it computes.
        sharing: Processes that share the memory.
        checkpointing: Whether the model computes activations twice.
    """
    fewer, more = (_kept(loss, batch) for batch in batches)
    a_token = (more - fewer) / (batches[1].input_ids.numel() - batches[0].input_ids.numel())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Estimate(a_token, trained * TRAINED_BYTES, free_bytes(device) // sharing, tokens, checkpointing)


def _kept(loss: Callable[[Batch], Tensor], batch: Batch) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that holds its own output is never freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = loss(batch)  # the graph lives until all is counted: no address is given out twice
    del held
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """What a process can still allocate: of its GPU, or of this machine."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: CUDA's by a type of its own, the CPU's by its words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explained(config: ExperimentConfig, device: torch.device, found: Callable[[], Estimate | None]) -> Iterator[None]:
    """Turn an allocator's refusal into what was measured, and which settings would fit.

    Args:
        config: The experiment's settings.
        device: Where it computes.
        found: The estimate, where there is one yet.

    Raises:
        OutOfMemory: in place of what the allocator raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        peak = peak_memory_mib(device) / 1024
        raise OutOfMemory(f"out of memory on {device}, peak {peak:.1f} GiB: {advice(config, found())}") from e


def advice(config: ExperimentConfig, found: Estimate | None) -> str:
    """Settings with less need of memory; the gradient of a step stays the same but for the last two."""
    training, model = config.training, config.model
    if found is None:  # not even the model
        smaller = ["model.quantization to nf4"] if model.quantization != "nf4" else []
        return f"the model itself does not fit; set {' or '.join([*smaller, 'training.sharding to fsdp'])}"
    each = found.activations * found.tokens / training.micro_batch_size
    room = int((RESERVE * found.free - found.fixed) // each)
    ways = []
    if training.micro_batch_size > 1:
        fitting = min(max(1, room), training.micro_batch_size - 1)
        ways.append(f"training.micro_batch_size to {fitting}")
    if not found.checkpointing:
        ways.append("training.gradient_checkpointing to true")
    if model.quantization == "none":
        ways.append("model.quantization to nf4")
    ways.append("data.tokenization.cutoff_len lower")
    return f"{found.describe()}; set {', or '.join(ways)}"
