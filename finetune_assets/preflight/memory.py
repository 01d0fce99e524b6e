"""Predict the memory of a training run by part, from tensor shapes alone."""

from dataclasses import dataclass, fields

from finetune_assets.preflight.case import Case, Simulated, simulate, stored_dtype

MIB = 1 << 20
RUNTIME_BYTES = {"cpu": 490 * MIB, "cuda": 0}
"""Memory of a process before it loads a model: Python, torch, transformers, peft. On a GPU only allocations count; the
0.5 GiB of the driver are part of `RESERVED`."""
GAPS = {"cpu": 1.4, "cuda": 1.0}
"""Ratio of resident memory to live memory at the peak. glibc keeps freed tensors in gaps that new ones often do not
fit: 37% to 43% more (benchmarks/RESULTS.md). The peak of a GPU counts live memory only."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per element, by dtype."""
MOMENTS_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes per trained weight of the two moments of AdamW, by optimizer."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of one process by part, in bytes.

    Attributes:
        runtime: The process before it loads a model.
        weights: Frozen base weights, as stored or quantized; if sharded, the shard of this process and one layer.
        mapped: Pages of the weights file that stay mapped in addition to quantized weights (CPU).
        adapter: Trained weights.
        optimizer: Gradients, the copy for all-reduce, and the moments of the optimizer.
        activations: Activations that the forward pass keeps for the backward pass.
        workspace: Temporary tensors at the peak: logits, gradients of activations.
        gaps: Freed memory that the allocator cannot reuse (CPU).
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

    def described(self) -> dict[str, float]:
        """Return the nonzero parts in MiB."""
        return {name: round(size / MIB, 1) for name, size in self.parts.items() if size}


def predict(case: Case) -> Memory:
    """Predict the peak memory of one process.

    Raises:
        NotSimulated: if the model cannot be simulated.
    """
    simulated, device = simulate(case), case.device
    return Memory(
        runtime=RUNTIME_BYTES[device.kind],
        weights=_weights(case, simulated),
        mapped=_mapped(case, simulated),
        adapter=round(simulated.trained),
        optimizer=_optimizer(case, simulated),
        activations=round(simulated.kept),
        workspace=round(simulated.peak - simulated.kept),
        gaps=round(simulated.peak * (GAPS[device.kind] - 1)),
    )


def _weights(case: Case, simulated: Simulated) -> int:
    processes = case.device.processes
    if case.experiment.training.sharding == "fsdp" and processes > 1:
        return round(simulated.weights / processes + simulated.largest_layer)
    return round(simulated.weights)


def _mapped(case: Case, simulated: Simulated) -> int:
    if case.device.kind != "cpu" or not simulated.quantized:
        return 0
    as_read = (stored_dtype(case.shape) or case.dtype) == case.dtype
    return round(simulated.quantized * BYTES[case.dtype]) if as_read else 0


def _optimizer(case: Case, simulated: Simulated) -> int:
    """Bytes of gradients and moments, and with several processes the copy for all-reduce."""
    weight_bytes = simulated.trained / simulated.trained_count if simulated.trained_count else 4
    reduced = weight_bytes if case.device.processes > 1 else 0
    moments = MOMENTS_BYTES[case.experiment.training.optimizer] * weight_bytes / 4
    return round(simulated.trained_count * (weight_bytes + reduced + moments))
