"""Optimizer and learning rate schedule."""

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from finetune_assets.config.schema import Training
from finetune_assets.errors import UserError


class UnsupportedOptimizer(UserError):
    """The device does not support the optimizer."""


def make_optimizer(parameters: list[nn.Parameter], training: Training, device: torch.device) -> torch.optim.Optimizer:
    """Create the optimizer selected by `training.optimizer`.

    Raises:
        UnsupportedOptimizer: for an 8-bit optimizer without CUDA.
    """
    kwargs: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **kwargs)
    if device.type != "cuda":
        raise UnsupportedOptimizer(f"training.optimizer: {training.optimizer} requires CUDA; set it to adamw")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[training.optimizer](parameters, **kwargs)


def make_scheduler(
    optimizer: torch.optim.Optimizer, training: Training, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Create the learning rate schedule for `steps` optimizer steps."""
    warmup = training.warmup_steps
    return get_scheduler(
        "constant_with_warmup" if training.lr_scheduler == "constant" else training.lr_scheduler,
        optimizer,
        num_warmup_steps=round(warmup * steps) if warmup < 1 else int(warmup),
        num_training_steps=steps,
    )
