"""Recipes of `benchmarks.train`, the settings that are tried for each, and the amount of work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

REFERENCE = {
    "quantization": "int8",
    "checkpointing": True,
    "by_length": False,
    "rank": 8,
    "targets": ["q_proj", "v_proj"],
}
CAPABILITIES = torch.cpu.get_capabilities()
PRECISIONS = ["fp32", *(["bf16"] if CAPABILITIES.get("avx512_bf16") or CAPABILITIES.get("amx_bf16") else [])]
"""On a CPU without instructions for it, bfloat16 is ten times slower than float32."""
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


def is_ours(name: str) -> bool:
    """Whether a recipe is this project's."""
    return name.startswith("e")


def _cpu(precisions: Sequence[str]) -> dict[str, Recipe]:
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


PACKED = {"micro": 4, "packing": True}
FLASH = {"micro": 2, "bf16": True, "packing": True, "attention": "flash_attention_2"}


def _cuda(precisions: Sequence[str]) -> dict[str, Recipe]:
    return {
        "a reference": Recipe("hf", [{**REFERENCE, "micro": 4}]),
        "b HF Trainer": Recipe("hf", [{"micro": micro, "bf16": True} for micro in (2, 4, 8)]),
        "c TRL": Recipe("trl", [{**FLASH, "padding_free": True}, {**FLASH, "liger": True}, {"micro": 4, "bf16": True}]),
        "d LLaMA-Factory": Recipe("llamafactory", [{"micro": micro, "bf16": True} for micro in (2, 4, 8)]),
        "e ours": Recipe("ours", [{"micro": micro} for micro in (1, 2, 4)]),
        "e ours, nf4": Recipe("ours", [{"micro": 2, "quantization": "nf4"}]),
        "e ours, int8": Recipe("ours", [{"micro": 2, "quantization": "int8"}]),
        "e ours, compiled": Recipe("ours", [{"micro": 2, "compile": True}]),
    }


CANDIDATES: dict[str, Callable[[Sequence[str]], dict[str, Recipe]]] = {"cpu": _cpu, "cuda": _cuda}
"""Recipes of a device by name, for the precisions to compare."""
SIZES = {
    "cpu": {"13m": Size(512, 160, 5, 3, 60), "smollm2-135m": Size(512, 64, 4, 2, 24)},
    "cuda": {"llama-3-8b": Size(4096, 2000, 12, 3, 60)},
}
"""Work on each shape; on others as on the last one of the device."""
