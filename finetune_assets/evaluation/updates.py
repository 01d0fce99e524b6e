"""How large an adapter's update of each module is, and how many directions it really has."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from finetune_assets.training.model import ModelError

ENERGY = 0.9
"""Share of an update's squared norm that a suggested rank keeps."""
PAIR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?")
LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one module's weights.

    Attributes:
        module: Its name in the model.
        rank: That it was trained with.
        norm: Frobenius norm.
        effective_rank: Of how many directions of equal size it would look like: the exponential of the entropy of its
            singular values (Roy and Vetterli 2007); from 1 to `rank`, 0 where nothing was learned.
        enough: The smallest rank that keeps `ENERGY` of the squared norm.
    """

    module: str
    rank: int
    norm: float
    effective_rank: float
    enough: int

    @property
    def layer(self) -> int | None:
        match = LAYER.search(self.module)
        return int(match[1]) if match else None

    @property
    def kind(self) -> str:
        """The module's name without its layer's."""
        return self.module.rpartition(".")[2]


def updates(folder: Path) -> list[Update]:
    """The update of every module, in the model's order.

    Raises:
        ModelError: if the folder holds no LoRA adapter.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as e:
        raise ModelError(f"{folder}: holds no adapter that loads: {' '.join(str(e).split())}") from e
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder}: is of type {config.peft_type}, not LORA")
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
    # the singular values of B A are those of the small product of their triangular factors
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
    """As PEFT finds it: the first key that the module's name ends with, as a regular expression."""
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), otherwise)


def suggested(found: list[Update]) -> tuple[int, dict[str, int]]:
    """A rank for most modules, and a `rank_pattern` for those that need another."""
    wanted = [update.enough for update in found]
    usual = max(set(wanted), key=lambda rank: (wanted.count(rank), rank))
    return usual, {update.module: update.enough for update in found if update.enough != usual}


def draw(found: list[Update], title: str, path: Path) -> None:
    """Norm and effective rank of each module, a column a layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(update.kind for update in found))
    layers = sorted({update.layer for update in found if update.layer is not None}) or [0]
    size = (max(6.0, 0.55 * len(layers) + 3), 0.42 * len(kinds) * 2 + 2.4)
    figure, panels = pyplot.subplots(2, 1, figsize=size, layout="constrained")
    for panel, (what, attribute) in zip(
        panels, (("norm of the update", "norm"), ("effective rank", "effective_rank")), strict=True
    ):
        grid = np.full((len(kinds), len(layers)), np.nan)
        for update in found:
            at = layers.index(update.layer) if update.layer is not None else 0
            grid[kinds.index(update.kind), at] = getattr(update, attribute)
        image = panel.imshow(grid, aspect="auto", cmap="viridis")
        panel.set_yticks(range(len(kinds)), kinds)
        panel.set_xticks(range(len(layers)), layers)
        panel.set_title(what, fontsize=10)
        if len(layers) <= 16:
            middle = np.nanmean(grid)
            for (row, column), value in np.ndenumerate(grid):
                if not np.isnan(value):
                    colour = "white" if value < middle else "black"
                    panel.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(image, ax=panel)
    panels[-1].set_xlabel("layer")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
