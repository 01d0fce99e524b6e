"""Ratio of our throughput in bfloat16 and float32; null, with the reason, where it cannot be measured."""

from collections.abc import Mapping
from typing import Any

import torch

from finetune_assets.training.precision import INSTRUCTIONS, cpu_instructions

FP32, BF16 = "e ours, fp32", "e ours, bf16"
"""Recipes of the two sides. Their settings have `precision`."""


def precisions(device: str) -> list[str]:
    """Precisions that a device computes in without emulation."""
    if device == "cuda":
        return ["fp32", *(["bf16"] if torch.cuda.is_bf16_supported() else [])]
    return ["fp32", *(["bf16"] if cpu_instructions() else [])]


def bf16_ratio(table: Mapping[str, Mapping[str, float]], figure: str, device: str) -> dict[str, Any]:
    """`bf16_vs_fp32`, and if it is null, `bf16_vs_fp32_reason`.

    Args:
        table: Medians by recipe and figure.
        figure: Throughput to compare.
        device: `cpu` or `cuda`.
    """
    if FP32 in table and BF16 in table:
        return {"bf16_vs_fp32": table[BF16][figure] / table[FP32][figure]}
    if "bf16" in precisions(device):
        reason = f"not measured: recipes {FP32} and {BF16}"
    else:
        reason = f"this device emulates bfloat16: no {' or '.join(INSTRUCTIONS)}"
    return {"bf16_vs_fp32": None, "bf16_vs_fp32_reason": reason}
