"""How large an adapter's update of each module is, as numbers that anybody reads without the adapter."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune_assets.artifacts.layout import UPDATES

ENERGY = 0.9
"""Share of an update's squared norm that a suggested rank keeps."""
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


def suggested(found: list[Update]) -> tuple[int, dict[str, int]]:
    """A rank for most modules, and a `rank_pattern` for those that need another."""
    wanted = [update.enough for update in found]
    usual = max(set(wanted), key=lambda rank: (wanted.count(rank), rank))
    return usual, {update.module: update.enough for update in found if update.enough != usual}


def write_updates(found: list[Update], folder: Path) -> None:
    text = json.dumps([asdict(update) for update in found], indent=1)
    (folder / UPDATES).write_text(text, encoding="utf-8")


def read_updates(folder: Path) -> list[Update]:
    """Those of an adapter's folder; none where it does not tell."""
    path = folder / UPDATES
    return [Update(**one) for one in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
