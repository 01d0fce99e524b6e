"""What must hold of an experiment's dataset before it is trained on."""

from functools import partial
from typing import Any

import dagster as dg

from finetune_assets.assets.making import share_check
from finetune_assets.assets.partitions import check_of_each
from finetune_assets.config.schema import Data

_spec = partial(check_of_each, "tokenized_dataset")

SPECS = [
    _spec(
        "refused_rows", "The share of rows that the experiment's template refuses is at most data.max_refused_share."
    ),
    _spec("truncated", "The share of train examples that cutoff_len cuts is at most data.checks.max_truncated_share."),
    _spec("unlabelled", "The share of rows without a token to learn is at most data.checks.max_unlabelled_share."),
    _spec(
        "overlap",
        "The share of held-out rows whose prompt is also trained on, but for case, spaces and punctuation, is at most "
        "data.checks.max_overlap_share.",
    ),
]


def dataset_checks(
    context: dg.AssetExecutionContext, statistics: dict[str, Any], data: Data
) -> list[dg.AssetCheckResult]:
    """The results of all SPECS.

    Args:
        context: Of the asset; a failure is told in its log.
        statistics: Of the dataset.
        data: What is let pass.
    """
    examples, allowed = statistics["examples"], data.checks
    taken = sum(examples.values()) + statistics["without_label"] + statistics["refused"]

    def check(name: str, count: str, total: int, most: float, setting: str, problem: str) -> dg.AssetCheckResult:
        rows = statistics.get(f"first_{count}", [])
        first = (
            f" The first, by their number in dolly_raw: {', '.join(map(str, rows))}" if isinstance(rows, list) else ""
        )
        told = f"{problem}, {setting} is {most:g}.{first if rows else ''}"
        return share_check(context, name, statistics[count], total, most, told, first_rows=str(rows))

    return [
        check(
            "refused_rows",
            "refused",
            taken,
            data.max_refused_share,
            "data.max_refused_share",
            f"are refused by the template ({statistics['first_refused']})",
        ),
        check(
            "truncated",
            "truncated",
            examples["train"],
            allowed.max_truncated_share,
            "data.checks.max_truncated_share",
            f"are cut at data.tokenization.cutoff_len {data.tokenization.cutoff_len}",
        ),
        check(
            "unlabelled",
            "without_label",
            taken,
            allowed.max_unlabelled_share,
            "data.checks.max_unlabelled_share",
            "have no token to learn",
        ),
        check(
            "overlap",
            "overlap",
            examples["val"] + examples["gate"],
            allowed.max_overlap_share,
            "data.checks.max_overlap_share",
            "are held out and their prompt is trained on",
        ),
    ]
