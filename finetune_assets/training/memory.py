"""Memory estimate of a training, measured on a few tokens, and advice for out-of-memory errors."""

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
"""Usable fraction of the free memory; allocators lose the rest to fragmentation."""
TRAINED_BYTES = 4 * 4
"""Bytes per trained weight: its gradient, the copy for the sum over processes, and AdamW's two moments, in float32."""


class OutOfMemory(UserError):
    """The device does not have enough memory for these settings."""


@dataclass(frozen=True)
class Estimate:
    """Memory that training requires in addition to the model.

    Attributes:
        activations: Bytes per token that are saved for the backward pass.
        fixed: Bytes of gradients and optimizer state.
        free: Free bytes at the time of the measurement.
        tokens: Tokens of a full micro-batch.
        checkpointing: Whether gradient checkpointing is enabled.
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
            f"activations {self.activations * self.tokens / GIB:.2f} GiB per micro-batch of {self.tokens:,} tokens, "
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
    """Measure the activation memory per token, as the difference between two micro-batches; saved weights cancel out.

    Args:
        loss: Computes the loss of a micro-batch.
        batches: Two micro-batches, the second with more tokens.
        tokens: Tokens of the largest micro-batch.
        model: The model.
        device: Device of the model.
        sharing: Number of processes that share the memory.
        checkpointing: Whether gradient checkpointing is enabled in the model.
    """
    fewer, more = (_saved_bytes(loss, batch) for batch in batches)
    bytes_per_token = (more - fewer) / (batches[1].input_ids.numel() - batches[0].input_ids.numel())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Estimate(bytes_per_token, trained * TRAINED_BYTES, free_bytes(device) // sharing, tokens, checkpointing)


def _saved_bytes(loss: Callable[[Batch], Tensor], batch: Batch) -> int:
    """Count the bytes that the forward pass saves for the backward pass."""
    sizes: dict[int, int] = {}

    def record_size(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that references its own output is never freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(record_size, lambda tensor: tensor):
        result = loss(batch)  # keeps the graph alive until all is counted, so no address is reused
    del result
    return sum(sizes.values())


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a process can still allocate, on its GPU or on this machine."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            meminfo = dict(line.split(":", 1) for line in file)
        return int(meminfo["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error; CUDA has an error type for it, the CPU allocator only a message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explained(
    config: ExperimentConfig, device: torch.device, measured: Callable[[], Estimate | None]
) -> Iterator[None]:
    """Convert out-of-memory errors into an error with the measured memory and the settings that would fit.

    Args:
        config: The experiment's settings.
        device: Device of the training.
        measured: Returns the memory estimate, or None before it was measured.

    Raises:
        OutOfMemory: in place of the allocator's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        peak = peak_memory_mib(device) / 1024
        raise OutOfMemory(f"out of memory on {device}, peak {peak:.1f} GiB: {advice(config, measured())}") from e


def advice(config: ExperimentConfig, measured: Estimate | None) -> str:
    """List settings that require less memory; all but the last two leave the gradient of a step unchanged."""
    training, model = config.training, config.model
    if measured is None:  # the model itself did not fit
        smaller = ["model.quantization to nf4"] if model.quantization != "nf4" else []
        return f"the model itself does not fit; set {' or '.join([*smaller, 'training.sharding to fsdp'])}"
    bytes_per_sequence = measured.activations * measured.tokens / training.micro_batch_size
    room = int((RESERVE * measured.free - measured.fixed) // bytes_per_sequence)
    changes = []
    if training.micro_batch_size > 1:
        fitting = min(max(1, room), training.micro_batch_size - 1)
        changes.append(f"training.micro_batch_size to {fitting}")
    if not measured.checkpointing:
        changes.append("training.gradient_checkpointing to true")
    if model.quantization == "none":
        changes.append("model.quantization to nf4")
    changes.append("data.tokenization.cutoff_len to a smaller value")
    return f"{measured.describe()}; set {', or '.join(changes)}"
