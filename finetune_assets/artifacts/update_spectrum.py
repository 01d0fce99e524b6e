"""Size and effective rank of an adapter's update per module, readable without loading the adapter."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune_assets.artifacts.layout import UPDATES

ENERGY = 0.9
"""Fraction of an update's squared norm that a suggested rank retains."""
LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Update:
    """An adapter's update of one module's weights.

    Attributes:
        module: Name of the module in the model.
        rank: Rank used in training.
        norm: Frobenius norm.
        effective_rank: Equivalent number of directions of equal size: the exponential of the entropy of the update's
            singular values (Roy and Vetterli 2007); from 1 to `rank`, 0 if nothing was learned.
        enough: The smallest rank that retains `ENERGY` of the squared norm.
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
        """Last part of the module's name, such as `q_proj`."""
        return self.module.rpartition(".")[2]


def suggested(updates: list[Update]) -> tuple[int, dict[str, int]]:
    """A rank for most modules, and a `rank_pattern` for modules that need another rank."""
    wanted = [update.enough for update in updates]
    usual = max(set(wanted), key=lambda rank: (wanted.count(rank), rank))
    return usual, {update.module: update.enough for update in updates if update.enough != usual}


def write_updates(updates: list[Update], folder: Path) -> None:
    text = json.dumps([asdict(update) for update in updates], indent=1)
    (folder / UPDATES).write_text(text, encoding="utf-8")


def read_updates(folder: Path) -> list[Update]:
    """The updates of an adapter's folder; empty if they were not recorded."""
    path = folder / UPDATES
    return [Update(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
