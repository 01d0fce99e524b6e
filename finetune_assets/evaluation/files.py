"""Read the files of an evaluation folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.artifacts.layout import EVALUATION, PREFERENCES, ROWS
from finetune_assets.config.retrieval_validation import RETRIEVED
from finetune_assets.store.json_object import InvalidJson, check_types, read_json

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from finetune_assets.evaluation.gate import Gain, PreferenceGain


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


def column(name: str, mode: str | None) -> str:
    """Return the name of a column of `rows.parquet`: of the mode that serves, or of another one."""
    return name if mode in (None, RETRIEVED) else f"{mode}_{name}"


def gain_of(folder: Path, confidence: float, mode: str | None = None) -> tuple["Gain", str]:
    """Return the challenger's gain over the champion (the base if there is no champion), and the opponent's name.

    Args:
        folder: Folder of the evaluation.
        confidence: Confidence level of the gain's lower bound.
        mode: Mode of an evaluation with retrieval; None for the mode that serves.

    Raises:
        InvalidJson: If the evaluation lacks the mode.
    """
    import numpy as np

    from finetune_assets.evaluation.gate import paired_gain

    before, after, tokens, opponent = _compared(folder, mode)
    return paired_gain(before, after, np.asarray(tokens, np.int64), confidence), opponent


def preference_gain_of(folder: Path, confidence: float) -> "PreferenceGain":
    """Return the challenger's gain in preferences over the champion (the base if there is no champion).

    Raises:
        InvalidJson: If the evaluation has no judgements.
    """
    from finetune_assets.evaluation.gate import PreferenceGain, paired_gain, paired_preferences

    measured = read_evaluation(folder).get("preferences")
    if measured is None or not (folder / PREFERENCES).is_file():
        raise InvalidJson(
            f"the evaluation in {folder} has no judgements; materialize adapter_evaluation again with force"
        )
    table = _read(folder / PREFERENCES)
    table = table.filter(table["comparable"])
    opponent = "champion" if "champion" in table.column_names else "base"
    before, after, base, weights = (_numbers(table[name]) for name in (opponent, "challenger", "base", "weight"))
    margin = paired_gain(-measured["beta"] * weights * before, -measured["beta"] * weights * after, weights, confidence)
    return PreferenceGain(paired_preferences(before, after, base, weights, confidence), margin)


def loss_increases(folder: Path, modes: Iterable[str]) -> dict[str, float]:
    """Return the increase of the challenger's loss over its opponent's by mode, in nats per token; NaN without rows.

    Raises:
        InvalidJson: If the evaluation lacks a mode.
    """
    increases = {}
    for mode in modes:
        before, after, tokens, _ = _compared(folder, mode)
        increases[mode] = float((after - before).sum() / tokens.sum()) if len(tokens) else float("nan")
    return increases


def _compared(folder: Path, mode: str | None) -> tuple[Any, Any, Any, str]:
    """Losses of opponent and challenger, and tokens of the comparable rows; and the opponent's name."""
    table = _read(folder / ROWS)
    opponent = "champion" if "champion" in table.column_names else "base"
    if (used := column("comparable", mode)) not in table.column_names:
        raise InvalidJson(
            f"{ROWS} of the evaluation in {folder} has no mode {mode}; materialize adapter_evaluation again with force"
        )
    table = table.filter(table[used])
    before, after, tokens = (_numbers(table[column(name, mode)]) for name in (opponent, "challenger", "tokens"))
    return before, after, tokens, opponent


def _read(file: Path) -> "pa.Table":
    """`read_table` would import what reads data sets of many files, and pandas with it: half a second of each run."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        return opened.read()


def _numbers(column: "pa.ChunkedArray") -> "NDArray[Any]":
    """Values of a column without nulls. `to_numpy` would import pandas."""
    import numpy as np

    return np.from_dlpack(column.combine_chunks())


def forgetting_of(evaluation: Mapping[str, Any]) -> float | None:
    """Return the challenger's loss minus the base's on general text, in nats per token; None if not measured."""
    base, challenger = (evaluation["contenders"][name].get("general_loss") for name in ("base", "challenger"))
    return None if base is None or challenger is None else challenger - base
