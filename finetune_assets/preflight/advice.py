"""Suggest settings that fit in memory, if the current ones do not."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from finetune_assets.preflight.case import Case, NotSimulated
from finetune_assets.preflight.memory import Memory, predict

BY_BATCH = ("activations", "workspace", "gaps")
"""Parts of the memory that grow with the micro-batch size."""
NOTHING = "a smaller base model, or a shorter data.tokenization.cutoff_len"


def ways(case: Case, memory: Memory) -> list[str]:
    """Return alternative changes that make a training fit, as overrides, smallest change first.

    Args:
        case: The case that does not fit.
        memory: Predicted memory of the case.
    """
    changes = [*_single_device_changes(case, memory)]
    if not changes and case.device.kind == "cuda" and case.experiment.training.sharding == "none":
        changes = [*_sharded_changes(case)]
    return changes or [NOTHING]


def _single_device_changes(case: Case, memory: Memory) -> Iterator[str]:
    """Changes without more devices: smaller micro-batch, gradient checkpointing, quantized base, or all of these."""
    changes: list[str] = []
    for change, changed in _memory_savings(case):
        changes += change
        predicted = _predicted(changed) if change else memory
        if predicted is None:
            continue
        if predicted.total <= case.device.usable and change:
            yield " with ".join(changes)
        elif size := _fitting_size(case, predicted):
            yield " with ".join([*changes, f"training.micro_batch_size={size}"])


def _predicted(case: Case) -> Memory | None:
    """Predict the memory of a case; None if the model does not support it."""
    with suppress(NotSimulated):
        return predict(case)
    return None


def _memory_savings(case: Case) -> Iterator[tuple[list[str], Case]]:
    """Yield cumulative changes that save memory, as overrides, with the resulting case."""
    yield [], case
    if not case.checkpointing:
        case = replace(case, checkpointing=True)
        yield ["training.gradient_checkpointing=true"], case
    if case.experiment.model.quantization != "nf4":
        yield ["model.quantization=nf4"], _with_nf4(case)


def _with_nf4(case: Case) -> Case:
    model = replace(case.experiment.model, quantization="nf4")
    return replace(case, experiment=replace(case.experiment, model=model), checkpointing=True)


def _fitting_size(case: Case, memory: Memory) -> int | None:
    """Return the largest smaller micro-batch size that fits; None if none does."""
    fits: Callable[[int], bool] = lambda size: _with_size(case, memory, size).total <= case.device.usable  # noqa: E731
    return next(filter(fits, range(case.experiment.training.micro_batch_size - 1, 0, -1)), None)


def _with_size(case: Case, memory: Memory, size: int) -> Memory:
    share = size / case.experiment.training.micro_batch_size
    return replace(memory, **{part: int(getattr(memory, part) * share) for part in BY_BATCH})


def _sharded_changes(case: Case) -> Iterator[str]:
    """Change that shards the base model over more GPUs."""
    case = _with_nf4(case)
    unsharded = _predicted(case)
    if unsharded is None:
        return
    smallest = _with_size(case, unsharded, 1)
    room_bytes = case.device.usable - (smallest.total - smallest.weights)
    if room_bytes > 0:
        yield (
            "training.gradient_checkpointing=true with model.quantization=nf4 with training.micro_batch_size=1 with "
            f"training.sharding=fsdp on at least {-(-smallest.weights // room_bytes)} GPUs"
        )
