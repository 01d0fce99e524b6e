"""What every recipe measures in the same way."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from finetune_assets.training.telemetry import hardware_name, multiplied_weights, peak_flops, peak_memory_mib


class Meter:
    """Counts from the end of the first step, in which caches fill and kernels are chosen, to the end of the last.

    Args:
        model: The base without an adapter, or the number of its multiplied weights, to know its operations a token.
        device: Where it computes.
        precision: What the peak rate is taken of: `fp32` or `bf16`.
    """

    def __init__(self, model: torch.nn.Module | int, device: torch.device, precision: str) -> None:
        multiplied = model if isinstance(model, int) else multiplied_weights(model)
        self.flops_a_token, self.device, self.precision = 4 * multiplied, device, precision
        self.peak = max(peak_flops(device, precision)[0], peak_flops(device, "fp32")[0])
        self.began: tuple[float, float] | None = None
        self.tokens = self.steps = 0
        self.loss = self.grad_norm = float("nan")

    def step_done(self, tokens: int) -> None:
        """Count a step of so many tokens, padding not counted."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.began is None:
            self.began = (time.monotonic(), time.process_time())
            return
        self.tokens += tokens
        self.steps += 1
        self.ended = (time.monotonic(), time.process_time())

    def report(self, **more: Any) -> None:
        """Print the figures as one JSON object on the last line."""
        assert self.began is not None
        wall, cpu = (end - begin for end, begin in zip(self.ended, self.began, strict=True))
        per_second = self.tokens / (wall if self.device.type == "cuda" else cpu)
        figures = {
            "tokens_per_s": self.tokens / wall,
            "tokens_per_cpu_s": self.tokens / cpu,
            "flops": self.flops_a_token * per_second,
            "precision": self.precision,
            "peak_flops": self.peak,
            "peak_memory_mib": peak_memory_mib(self.device),
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "tokens": self.tokens,
            "steps": self.steps,
            "hardware": hardware_name(self.device),
        }
        print(json.dumps({**figures, **more}))


def given() -> tuple[Any, dict[str, Any], torch.device]:
    """The subject, this side's settings, and the device, from the command line."""
    from benchmarks.train_subject import read

    subject, settings = read(Path(sys.argv[1])), json.loads(sys.argv[2])
    return subject, settings, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lora_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The adapter, the same for all but the reference."""
    return {
        "r": settings.get("rank", 16),
        "lora_alpha": 32,
        "lora_dropout": settings.get("dropout", 0.05),
        "target_modules": settings.get("targets", "all-linear"),
        "task_type": "CAUSAL_LM",
    }


def plain_rows(subject: Any) -> list[dict[str, list[int]]]:
    with open(subject.rows, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
