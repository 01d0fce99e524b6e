"""Norm and effective rank of an adapter's update of each module."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from finetune_assets.artifacts.update_spectrum import ENERGY, Update
from finetune_assets.training.model import ModelError

PAIR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?")


def updates(folder: Path) -> list[Update]:
    """Compute the update of every module, in the order of the model.

    Raises:
        ModelError: if the folder does not contain a LoRA adapter.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as e:
        raise ModelError(f"{folder}: the adapter cannot be loaded: {' '.join(str(e).split())}") from e
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder}: the adapter type is {config.peft_type}, but must be LORA")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := PAIR.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2][-1]] = tensor.float()
    whole = {module: pair for module, pair in pairs.items() if {"A", "B"} <= pair.keys()}
    return [_update(module, pair["A"], pair["B"], config) for module, pair in sorted(whole.items(), key=_in_order)]


def _in_order(item: tuple[str, Any]) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in item[0].split(".")]


def _update(module: str, a: Tensor, b: Tensor, config: LoraConfig) -> Update:
    rank = a.shape[0]
    alpha = _of_module(config.alpha_pattern, module, config.lora_alpha)
    scaling = alpha / (rank**0.5 if config.use_rslora else rank)
    # B A has the same singular values as the small product of the triangular factors of B and A
    triangular = torch.linalg.qr(b)[1] @ torch.linalg.qr(a.t())[1].t()
    values = np.sort((torch.linalg.svdvals(triangular) * scaling).double().numpy())[::-1]
    total = values.sum()
    if total == 0:
        return Update(module, rank, 0.0, 0.0, 1)
    shares = values / total
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    energy = np.cumsum(values**2) / (values**2).sum()
    enough = int(np.searchsorted(energy, ENERGY)) + 1
    return Update(module, rank, float(np.sqrt((values**2).sum())), float(np.exp(entropy)), enough)


def _of_module(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """Look up a value as PEFT does: by the first key, a regular expression, that matches the end of the module name."""
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), otherwise)
