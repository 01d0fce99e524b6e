"""Read the files of an evaluation folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.artifacts.layout import EVALUATION, ROWS
from finetune_assets.store.json_object import InvalidJson, check_types, read_json

if TYPE_CHECKING:
    from finetune_assets.evaluation.gate import Gain


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read the content of `evaluation.json`.

    Raises:
        InvalidJson: If it is not an evaluation.
    """
    where = f"the evaluation in {folder}"
    evaluation = read_json(folder / EVALUATION, where)
    try:
        check_types(evaluation, {"rows": int, "contenders": dict})
        for name in evaluation["contenders"]:
            check_types(evaluation["contenders"], {name: dict})
    except InvalidJson as e:
        raise InvalidJson(f"{EVALUATION} of {where}: {e}; materialize adapter_evaluation again with force") from None
    return evaluation


def gain_of(folder: Path, confidence: float) -> tuple["Gain", str]:
    """Return the challenger's gain over the champion (the base if there is no champion), and the opponent's name."""
    import numpy as np
    import pyarrow.parquet as pq

    from finetune_assets.evaluation.gate import paired_gain

    table = pq.read_table(folder / ROWS)
    opponent = "champion" if "champion" in table.column_names else "base"
    table = table.filter(table["comparable"])
    before, after, tokens = (table[name].to_numpy() for name in (opponent, "challenger", "tokens"))
    return paired_gain(before, after, np.asarray(tokens, np.int64), confidence), opponent


def forgetting_of(evaluation: Mapping[str, Any]) -> float | None:
    """Return the challenger's loss minus the base's on general text, in nats per token; None if not measured."""
    base, challenger = (evaluation["contenders"][name].get("general_loss") for name in ("base", "challenger"))
    return None if base is None or challenger is None else challenger - base
