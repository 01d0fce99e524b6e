"""Evaluations with retrieval: metrics of each mode and contender side by side."""

from collections.abc import Mapping
from typing import Any

from finetune_assets.evaluation.metrics import RETRIEVAL_METRICS, ROW_METRICS
from finetune_assets.reporting.numbers import in_order

MODES = "mode"
METRICS = (*ROW_METRICS, *RETRIEVAL_METRICS)
TITLES = {"modes": "Modes", "unseen_passages": "Modes, on rows whose golden passages no training row has"}
"""Titles of the tables, by key in `evaluation.json`."""


def mode_table(modes: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a table of `modes` or `unseen_passages` of `evaluation.json`, and its columns.

    Metrics without a value are left out.
    """
    measured = [
        (mode, numbers["rows"], name, numbers["contenders"][name])
        for mode, numbers in modes.items()
        for name in in_order(numbers["contenders"])
    ]
    shown = [metric for metric in METRICS if any(metric.name in metrics for *_, metrics in measured)]
    rows = [
        {
            MODES: mode,
            "rows": rows,
            "model": name,
            **{
                metric.title: metric.form.format(metrics[metric.name]) if metric.name in metrics else ""
                for metric in shown
            },
        }
        for mode, rows, name, metrics in measured
    ]
    return rows, [MODES, "rows", "model", *(metric.title for metric in shown)]
