"""How fast a training will be: as fast as the trainings most like it were on the same hardware."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from finetune_assets.training.telemetry import PEAK_TFLOPS

ASSUMED_MFU = 0.35
"""Of a GPU that nothing has been trained on yet."""


@dataclass(frozen=True)
class Kind:
    """What decides how fast a training is, beside its hardware.

    Attributes:
        weights: Of the base, that a token is multiplied with.
        quantization: Of the base.
        precision: What is computed in.
        checkpointing: Whether activations are computed twice.
        processes: That train together.
    """

    weights: int
    quantization: str
    precision: str
    checkpointing: bool
    processes: int


@dataclass(frozen=True)
class Past:
    """What an earlier training showed.

    Attributes:
        hardware: What it ran on.
        kind: What it was.
        flops: Operations a second and process, 4 a weight and token.
    """

    hardware: str
    kind: Kind
    flops: float

    @staticmethod
    def of(state: dict[str, Any]) -> "Past | None":
        """From a `trainer_state.json`; None from one that does not say enough."""
        active = state.get("active", {})
        weights, seconds = active.get("multiplied_weights"), state.get("seconds")
        if not weights or not seconds or not active.get("hardware"):
            return None
        kind = Kind(
            weights,
            active["quantization"],
            active["precision"],
            bool(active["gradient_checkpointing"]),
            active["processes"],
        )
        return Past(active["hardware"], kind, 4 * weights * state["tokens"] / seconds / kind.processes)


ALIKE: tuple[Callable[[Kind, Kind], bool], ...] = (
    lambda a, b: a == b,
    lambda a, b: (a.weights, a.quantization, a.precision) == (b.weights, b.quantization, b.precision),
    lambda a, b: (a.quantization, a.precision, a.checkpointing) == (b.quantization, b.precision, b.checkpointing),
    lambda a, b: a.quantization == b.quantization,
    lambda a, b: True,
)
"""How alike two trainings may be, the most alike first."""


def speed(hardware: str, kind: Kind, past: Iterable[Past]) -> tuple[float | None, str]:
    """Operations a second and process, and where that is known from; None where it is not.

    Args:
        hardware: The device's name.
        kind: What is to be trained.
        past: Earlier trainings, on any hardware.
    """
    here = [one for one in past if hardware in one.hardware or one.hardware in hardware]
    for alike in ALIKE:
        if like := [one for one in here if alike(one.kind, kind)]:
            return median(one.flops for one in like), _known_from(like, kind, hardware)
    part = next((part for part in PEAK_TFLOPS if part in hardware), None)
    if part is None:
        return None, f"nothing was trained on {hardware} yet"
    guess = f"{ASSUMED_MFU:.0%} MFU, assumed: no measured run on {hardware} yet"
    return PEAK_TFLOPS[part] * 1e12 * ASSUMED_MFU, guess


def _known_from(like: Sequence[Past], kind: Kind, hardware: str) -> str:
    alike = "like it" if all(one.kind == kind for one in like) else "of other kinds"
    return f"{len(like)} earlier training{'s' * (len(like) > 1)} {alike} on {hardware}"
