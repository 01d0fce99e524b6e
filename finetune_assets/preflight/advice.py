"""Which settings would fit, where those that are set do not."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from finetune_assets.preflight.case import Case, NotSimulated
from finetune_assets.preflight.memory import Memory, predict

BY_BATCH = ("activations", "workspace", "gaps")
"""Parts of the memory that grow with the micro-batch."""
NOTHING = "a smaller base model, or a shorter data.tokenization.cutoff_len"


def ways(case: Case, memory: Memory) -> list[str]:
    """Changes after each of which it fits, as overrides, the least change first.

    Args:
        case: What does not fit.
        memory: What it takes.
    """
    found = [*_ways_on_one(case, memory)]
    if not found and case.device.kind == "cuda" and case.experiment.training.sharding == "none":
        found = [*_sharded(case)]
    return found or [NOTHING]


def _ways_on_one(case: Case, memory: Memory) -> Iterator[str]:
    """Without more devices: a smaller micro-batch, activations computed twice, a quantized base, or all of these."""
    changes: list[str] = []
    for change, changed in _steps(case):
        changes += change
        now = _predicted(changed) if change else memory
        if now is None:
            continue
        if now.total <= case.device.usable and change:
            yield " with ".join(changes)
        elif size := _fitting_size(case, now):
            yield " with ".join([*changes, f"training.micro_batch_size={size}"])


def _predicted(case: Case) -> Memory | None:
    """A change that this model does not take is no way."""
    with suppress(NotSimulated):
        return predict(case)
    return None


def _steps(case: Case) -> Iterator[tuple[list[str], Case]]:
    """Each change that saves memory, with what is set then."""
    yield [], case
    if not case.checkpointing:
        case = replace(case, checkpointing=True)
        yield ["training.gradient_checkpointing=true"], case
    if case.experiment.model.quantization != "nf4":
        yield ["model.quantization=nf4"], _in_nf4(case)


def _in_nf4(case: Case) -> Case:
    model = replace(case.experiment.model, quantization="nf4")
    return replace(case, experiment=replace(case.experiment, model=model), checkpointing=True)


def _fitting_size(case: Case, memory: Memory) -> int | None:
    """The largest micro-batch that fits, if a smaller one does."""
    fits: Callable[[int], bool] = lambda size: _with_size(case, memory, size).total <= case.device.usable  # noqa: E731
    return next(filter(fits, range(case.experiment.training.micro_batch_size - 1, 0, -1)), None)


def _with_size(case: Case, memory: Memory, size: int) -> Memory:
    share = size / case.experiment.training.micro_batch_size
    return replace(memory, **{part: int(getattr(memory, part) * share) for part in BY_BATCH})


def _sharded(case: Case) -> Iterator[str]:
    """With the base spread over more GPUs."""
    case = _in_nf4(case)
    whole = _predicted(case)
    if whole is None:
        return
    least = _with_size(case, whole, 1)
    room = case.device.usable - (least.total - least.weights)
    if room > 0:
        yield (
            "training.gradient_checkpointing=true with model.quantization=nf4 with training.micro_batch_size=1 with "
            f"training.sharding=fsdp on at least {-(-least.weights // room)} GPUs"
        )
