"""How much memory a training will take, by part, from shapes alone."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.config.validation import COMPUTED_AS_STORED
from finetune_assets.preflight.simulation import QuantizedLinear, Simulated, on_meta, simulate
from finetune_assets.training.model import trainable

MIB = 1 << 20
RUNTIME_BYTES = {"cpu": 490 * MIB, "cuda": 0}
"""Of a process before it reads a model: Python, torch, transformers, peft. On a GPU only what is allocated is counted;
the driver's own 0.5 GiB are in `RESERVED`."""
GAPS = {"cpu": 1.4, "cuda": 1.0}
"""What a process takes over what is alive at the highest point. glibc keeps what tensors give back, in gaps that the
next ones often do not fit: 37% to 43% more (benchmarks/RESULTS.md). A GPU's peak counts what is alive."""
RESERVED = {"cpu": 0.95, "cuda": 0.9}
"""Share of the device's memory that is planned with; the rest goes to gaps between allocations, and to the driver."""
MOMENTS_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""AdamW's two of a trained weight."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its highest, by what they are for.

    Attributes:
        runtime: The process itself.
        weights: The frozen base, as it is stored and quantized; of a sharded one this process's part, and one layer.
        mapped: Its file, as far as it stays mapped beside quantized weights (CPU).
        adapter: Trained weights.
        optimizer: Their gradients, the copy that is summed over processes, and the optimizer's moments.
        activations: What the forward pass keeps for the backward pass.
        workspace: What comes and goes at the highest point: logits, gradients of activations.
        gaps: What the allocator cannot use again (CPU).
    """

    runtime: int
    weights: int
    mapped: int
    adapter: int
    optimizer: int
    activations: int
    workspace: int
    gaps: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Device:
    """What a training is planned for.

    Attributes:
        kind: `cpu` or `cuda`.
        bytes: Memory of one GPU, or of the machine.
        processes: That train together.
        bf16: Whether it computes in bfloat16.
        name: As its maker calls it.
    """

    kind: str
    bytes: int
    processes: int
    bf16: bool
    name: str

    @property
    def usable(self) -> int:
        """Bytes that one process may plan with."""
        sharing = self.processes if self.kind == "cpu" else 1
        return int(self.bytes * RESERVED[self.kind]) // sharing

    def precision(self, experiment: ExperimentConfig) -> str:
        """As `compute_precision` decides there."""
        wanted = experiment.training.precision
        return wanted if wanted != "auto" else "bf16" if self.bf16 else "fp32"

    def dtype(self, experiment: ExperimentConfig) -> torch.dtype:
        """As `weights_dtype` decides there."""
        name: str = experiment.model.dtype
        if name == "auto":
            name = COMPUTED_AS_STORED.get(experiment.training.precision) or ("bfloat16" if self.bf16 else "float32")
        return getattr(torch, name)  # type: ignore[no-any-return]


def predict(
    shape: PretrainedConfig,
    experiment: ExperimentConfig,
    device: Device,
    lengths: list[int],
    learned: int,
    checkpointing: bool,
) -> Memory:
    """The memory of one process.

    Args:
        shape: The base model's configuration.
        experiment: The settings.
        device: Where it is to be trained.
        lengths: Tokens of the examples of the largest micro-batch.
        learned: Its learned tokens.
        checkpointing: Whether activations are computed twice.
    """
    dtype = device.dtype(experiment)
    model = on_meta(shape, experiment, dtype)
    step = simulate(
        shape, experiment, dtype, lengths, learned, device.kind, device.precision(experiment), checkpointing
    )
    return _summed(model, shape, experiment, device, step)


def _summed(
    model: PeftModel, shape: PretrainedConfig, experiment: ExperimentConfig, device: Device, step: Simulated
) -> Memory:
    trained = trainable(model)
    count = sum(parameter.numel() for parameter in trained)
    weights = base_bytes(model)
    stored = getattr(shape, "dtype", None) or device.dtype(experiment)
    mapped = 0
    if device.kind == "cpu" and experiment.model.quantization != "none" and stored == device.dtype(experiment):
        mapped = stored.itemsize * sum(p.numel() for p in quantized_weights(model))
    if experiment.training.sharding == "fsdp" and device.processes > 1:
        weights = weights // device.processes + largest_layer(model)
    each = trained[0].element_size() if trained else 4
    summing = each if device.processes > 1 else 0
    return Memory(
        runtime=RUNTIME_BYTES[device.kind],
        weights=weights,
        mapped=mapped,
        adapter=sum(parameter.nbytes for parameter in trained),
        optimizer=count * (each + summing + MOMENTS_BYTES[experiment.training.optimizer] * each // 4),
        activations=round(step.kept),
        workspace=round(step.peak - step.kept),
        gaps=round(step.peak * (GAPS[device.kind] - 1)),
    )


def base_bytes(model: nn.Module) -> int:
    """Of the frozen weights and buffers, as bitsandbytes keeps those that it quantizes."""
    kinds = {id(module.weight): module.kind for module in model.modules() if isinstance(module, QuantizedLinear)}
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return sum(
        quantized_bytes(parameter, kinds[key]) if key in kinds else parameter.nbytes
        for key, parameter in frozen.items()
    )


def quantized_weights(model: nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, QuantizedLinear)]


def quantized_bytes(weight: torch.Tensor, kind: str) -> int:
    """Of one weight: nf4 has half a byte an element, a byte for each block of 64, and 4 for each 256 of those; int8 a
    byte an element, and 4 a row."""
    count = weight.numel()
    if kind == "int8":
        return count + 4 * weight.shape[0]
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256)


def largest_layer(model: nn.Module) -> int:
    """Bytes of the frozen weights that are gathered at once: the embeddings, or a layer."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [base_bytes(layer) for layer in max(lists, key=len)] if lists else [0]
    return max(layers)


def described(memory: Memory) -> dict[str, Any]:
    """In MiB, as a report shows it."""
    return {name: round(size / MIB, 1) for name, size in {**memory.parts, "total": memory.total}.items()}
