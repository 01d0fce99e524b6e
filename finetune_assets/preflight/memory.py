"""How much memory a training will take, by part, from shapes alone."""

from dataclasses import dataclass, fields

from finetune_assets.preflight.case import Case, Simulated, simulate, stored_dtype

MIB = 1 << 20
RUNTIME_BYTES = {"cpu": 490 * MIB, "cuda": 0}
"""Of a process before it reads a model: Python, torch, transformers, peft. On a GPU only what is allocated is counted;
the driver's own 0.5 GiB are in `RESERVED`."""
GAPS = {"cpu": 1.4, "cuda": 1.0}
"""What a process takes over what is alive at the highest point. glibc keeps what tensors give back, in gaps that the
next ones often do not fit: 37% to 43% more (benchmarks/RESULTS.md). A GPU's peak counts what is alive."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a number, by its type."""
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

    def described(self) -> dict[str, float]:
        """In MiB, as a report shows it."""
        return {name: round(size / MIB, 1) for name, size in self.parts.items() if size}


def predict(case: Case) -> Memory:
    """The memory of one process.

    Raises:
        NotSimulated: if the model cannot be simulated.
    """
    found, device = simulate(case), case.device
    return Memory(
        runtime=RUNTIME_BYTES[device.kind],
        weights=_weights(case, found),
        mapped=_mapped(case, found),
        adapter=round(found.trained),
        optimizer=_optimizer(case, found),
        activations=round(found.kept),
        workspace=round(found.peak - found.kept),
        gaps=round(found.peak * (GAPS[device.kind] - 1)),
    )


def _weights(case: Case, found: Simulated) -> int:
    processes = case.device.processes
    if case.experiment.training.sharding == "fsdp" and processes > 1:
        return round(found.weights / processes + found.largest_layer)
    return round(found.weights)


def _mapped(case: Case, found: Simulated) -> int:
    if case.device.kind != "cpu" or not found.quantized:
        return 0
    as_read = (stored_dtype(case.shape) or case.dtype) == case.dtype
    return round(found.quantized * BYTES[case.dtype]) if as_read else 0


def _optimizer(case: Case, found: Simulated) -> int:
    """Gradients and moments; with several processes the sum's copy too."""
    each = found.trained / found.trained_count if found.trained_count else 4
    summing = each if case.device.processes > 1 else 0
    moments = MOMENTS_BYTES[case.experiment.training.optimizer] * each / 4
    return round(found.trained_count * (each + summing + moments))
