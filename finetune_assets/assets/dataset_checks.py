"""Asset checks of `tokenized_dataset`, evaluated before training."""

from functools import partial
from typing import Any

import dagster as dg

from finetune_assets.assets.materialization import fraction_check
from finetune_assets.assets.partitions import check_of_each
from finetune_assets.config.schema import Data

_spec = partial(check_of_each, "tokenized_dataset")

SPECS = [
    _spec("refused_rows", "Share of rows that the experiment's template rejects is at most data.max_refused_share."),
    _spec(
        "truncated", "Share of training examples truncated at cutoff_len is at most data.checks.max_truncated_share."
    ),
    _spec("unlabelled", "Share of rows without a label token is at most data.checks.max_unlabelled_share."),
    _spec(
        "overlap",
        "Share of held-out rows with a prompt that is also in the training split (up to case, spaces and punctuation) "
        "is at most data.checks.max_overlap_share.",
    ),
]


def dataset_checks(
    context: dg.AssetExecutionContext, statistics: dict[str, Any], data: Data
) -> list[dg.AssetCheckResult]:
    """Evaluate all checks in SPECS.

    Args:
        context: Context of the asset step; failures are written to its log.
        statistics: Statistics of the dataset.
        data: Data settings with the thresholds of the checks.
    """
    examples, allowed = statistics["examples"], data.checks
    total_rows = sum(examples.values()) + statistics["without_label"] + statistics["refused"]

    def check(name: str, count: str, total: int, most: float, setting: str, problem: str) -> dg.AssetCheckResult:
        rows = statistics.get(f"first_{count}", [])
        first = f" First rows, by number in dolly_raw: {', '.join(map(str, rows))}" if isinstance(rows, list) else ""
        message = f"{problem} ({setting} = {most:g}).{first if rows else ''}"
        return fraction_check(context, name, statistics[count], total, most, message, first_rows=str(rows))

    return [
        check(
            "refused_rows",
            "refused",
            total_rows,
            data.max_refused_share,
            "data.max_refused_share",
            f"rejected by the template ({statistics['first_refused']})",
        ),
        check(
            "truncated",
            "truncated",
            examples["train"],
            allowed.max_truncated_share,
            "data.checks.max_truncated_share",
            f"truncated at data.tokenization.cutoff_len = {data.tokenization.cutoff_len}",
        ),
        check(
            "unlabelled",
            "without_label",
            total_rows,
            allowed.max_unlabelled_share,
            "data.checks.max_unlabelled_share",
            "have no label token",
        ),
        check(
            "overlap",
            "overlap",
            examples["val"] + examples["gate"],
            allowed.max_overlap_share,
            "data.checks.max_overlap_share",
            "are held out, but their prompt is also in the training split",
        ),
    ]
