"""Estimate training speed from the most similar earlier training runs on the same hardware."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from finetune_assets.training.telemetry import PEAK_TFLOPS

ASSUMED_MFU = 0.35
"""MFU assumed for a GPU without earlier training runs."""


@dataclass(frozen=True)
class Kind:
    """Properties of a training run that determine its speed, besides the hardware.

    Attributes:
        weights: Number of base weights that each token is multiplied with.
        quantization: Quantization of the base model.
        precision: Compute precision.
        checkpointing: Whether gradient checkpointing is on.
        processes: Number of training processes.
    """

    weights: int
    quantization: str
    precision: str
    checkpointing: bool
    processes: int


@dataclass(frozen=True)
class Past:
    """Speed of an earlier training run.

    Attributes:
        hardware: Hardware that it ran on.
        kind: Properties of the run.
        flops: Operations per second and process, at 4 operations per weight and token.
    """

    hardware: str
    kind: Kind
    flops: float

    @staticmethod
    def of(state: dict[str, Any]) -> "Past | None":
        """Create from a `trainer_state.json`; None if it lacks the required fields, or has them with other types."""
        try:
            return Past._of(state)
        except (KeyError, TypeError, AttributeError, ArithmeticError):
            return None

    @staticmethod
    def _of(state: dict[str, Any]) -> "Past | None":
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
"""Similarity criteria of two training runs, strictest first."""


def speed(hardware: str, kind: Kind, past: Iterable[Past]) -> tuple[float | None, str]:
    """Estimate operations per second and process.

    Args:
        hardware: Name of the device.
        kind: Properties of the planned training run.
        past: Earlier training runs, on any hardware.

    Returns:
        The speed (None if unknown), and the source of the estimate or why it is unknown.
    """
    comparable = [run for run in past if hardware in run.hardware or run.hardware in hardware]
    for alike in ALIKE:
        if similar := [run for run in comparable if alike(run.kind, kind)]:
            return median(run.flops for run in similar), _source(similar, kind, hardware)
    part = next((part for part in PEAK_TFLOPS if part in hardware), None)
    if part is None:
        return None, f"no training run on {hardware} yet"
    source = f"{ASSUMED_MFU:.0%} MFU, assumed: no measured run on {hardware} yet"
    return PEAK_TFLOPS[part] * 1e12 * ASSUMED_MFU, source


def _source(similar: Sequence[Past], kind: Kind, hardware: str) -> str:
    settings = "the same settings" if all(run.kind == kind for run in similar) else "similar settings"
    return f"{len(similar)} earlier training run{'s' * (len(similar) > 1)} with {settings} on {hardware}"
