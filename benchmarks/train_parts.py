"""The parts of `benchmarks.train --device cuda`, each of which ends within `PART_SECONDS`.

Every part has `e ours` as its base line, so the ratios of a part are of one machine and one call. A part begins a run
only if the longest run so far would end in time; what is left out is reported.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PART_SECONDS = 200
"""Three parts take at most ten minutes."""
OURS = {"e ours": ("ours", [{"micro": 2}])}
Recipes = dict[str, tuple[str, list[dict[str, Any]]]]
"""Of each side: the module that runs it, and the settings that are tried."""

PARTS: dict[str, Recipes] = {
    "peers": {
        **OURS,
        "b HF Trainer": ("hf", [{"micro": micro, "bf16": True} for micro in (4, 8)]),
        "c TRL": (
            "trl",
            [
                {"micro": 4, "bf16": True},
                {"micro": 2, "bf16": True, "packing": True, "liger": True, "attention": "flash_attention_2"},
            ],
        ),
        "d LLaMA-Factory": ("llamafactory", [{"micro": 4, "bf16": True}]),
    },
    "kernels": {
        **OURS,
        "e ours, liger": ("ours", [{"micro": 2, "kernels": "liger"}]),
        "e ours, compiled": ("ours", [{"micro": 2, "compile": True}]),
    },
    "quantized": {
        **OURS,
        "e ours, nf4": ("ours", [{"micro": 2, "quantization": "nf4"}]),
        "e ours, int8": ("ours", [{"micro": 2, "quantization": "int8"}]),
        "a reference": (
            "hf",
            [
                {
                    "quantization": "int8",
                    "checkpointing": True,
                    "by_length": False,
                    "rank": 8,
                    "targets": ["q_proj", "v_proj"],
                    "micro": 4,
                }
            ],
        ),
    },
}
"""Parts by name: trainers side by side, fused kernels, and quantized base models with the reference example."""


@dataclass
class Deadline:
    """Time of a part.

    Attributes:
        seconds: Time for the whole part; None for no limit.
        clock: Returns seconds.
        longest: Duration of the longest run so far, in seconds.
        left_out: Descriptions of the runs that were left out.
    """

    seconds: float | None
    clock: Callable[[], float] = time.monotonic
    longest: float = 0.0
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def remaining(self) -> float | None:
        """Seconds until the part must have ended."""
        return None if self.seconds is None else self.seconds - (self.clock() - self.began)

    def run(self, name: str, side: Callable[[float | None], Any]) -> Any:
        """Run a side with the time that remains, or leave it out and return None."""
        remaining = self.remaining
        if remaining is not None and remaining <= self.longest:
            self.left_out.append(name)
            return None
        began = self.clock()
        result = side(remaining)
        self.longest = max(self.longest, self.clock() - began)
        return result
