"""Recipes of `benchmarks.train`, the settings that are tried for each, and the amount of work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_assets.training.precision import cpu_instructions

REFERENCE = {
    "quantization": "int8",
    "checkpointing": True,
    "by_length": False,
    "rank": 8,
    "targets": ["q_proj", "v_proj"],
}
PRECISIONS = ["fp32", *(["bf16"] if cpu_instructions() else [])]
"""On a CPU without instructions for it, bfloat16 is ten times slower than float32."""
PACKED = {"micro": 4, "packing": True}
MICRO = (1, 2, 4, 8)
"""Micro-batches that every recipe tries."""


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        module: Module of `benchmarks.train_recipes` that runs it.
        candidates: Settings that are tried.
    """

    module: str
    candidates: Sequence[dict[str, Any]]

    def first(self) -> "Recipe":
        """The recipe with its first settings alone."""
        return replace(self, candidates=self.candidates[:1])


@dataclass(frozen=True)
class Size:
    """Amount of work.

    Attributes:
        length: Longest example in tokens.
        examples: Number of examples.
        steps: Number of global batches that the examples make up.
        tried_steps: Number of steps with each candidate; the first one is not counted.
        quick_examples: Number of examples with `--quick`, in three steps.
    """

    length: int
    examples: int
    steps: int
    tried_steps: int
    quick_examples: int

    def quick(self) -> "Size":
        """The size for `--quick`."""
        return replace(self, examples=self.quick_examples, steps=3, tried_steps=2)


def fastest(measured: Sequence[dict[str, Any]], figure: str, most_mib: float | None = None) -> dict[str, Any]:
    """The fastest of one recipe's measurements; with a limit of memory, of those within it, if there are any.

    Args:
        measured: Measurements of different settings; not empty.
        figure: Name of the throughput.
        most_mib: Maximum peak memory in MiB.
    """
    within = [each for each in measured if most_mib is None or each["peak_memory_mib"] <= most_mib]
    return max(within or measured, key=lambda each: each[figure])


def is_ours(name: str) -> bool:
    """Whether a recipe is this project's."""
    return name.startswith("e")


def is_peer(name: str) -> bool:
    """Whether a recipe is another trainer's."""
    return name[0] in "bcd"


def candidates(precisions: Sequence[str]) -> dict[str, Recipe]:
    """Each recipe with as many settings; ours once per precision, because their ratio is measured too."""
    bf16 = [{"bf16": True} if precision == "bf16" else {} for precision in precisions]
    micro = [{"micro": size, **extra} for extra in bf16 for size in MICRO]
    packed = [
        {**settings, **extra} for extra in bf16 for settings in [*({"micro": size} for size in MICRO[1:]), PACKED]
    ]
    ours = {
        f"e ours, {precision}": Recipe("ours", [{"micro": size, "precision": precision} for size in MICRO])
        for precision in precisions
    }
    return {
        "a reference": Recipe("hf", [{**REFERENCE, "micro": 4}]),
        "b HF Trainer": Recipe("hf", micro),
        "c TRL": Recipe("trl", packed),
        "d LLaMA-Factory": Recipe("llamafactory", micro),
        **ours,
    }


SIZES = {"13m": Size(512, 160, 5, 3, 60), "smollm2-135m": Size(512, 64, 4, 2, 24)}
"""Work on each shape; on others as on the last one."""
