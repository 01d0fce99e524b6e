"""Asset checks of `tokenized_dataset`, evaluated before training."""

from collections.abc import Iterator
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
        "Share of held-out rows with a near-duplicate in the training split is at most data.checks.max_overlap_share.",
    ),
    _spec(
        "left_out",
        "Share of training rows left out as near-duplicates of held-out rows is at most "
        "data.checks.max_left_out_share. Warns only.",
        blocking=False,
    ),
    _spec(
        "conflicting_judgements",
        "Share of pairs and labelled answers that contradict another one of the same answers is at most "
        "data.checks.max_conflicting_share.",
    ),
    _spec(
        "length_bias",
        "Preferred answers are longer or shorter than the others by at most data.checks.max_length_bias on average. "
        "Warns only.",
        blocking=False,
    ),
    _spec(
        "split_fractions",
        "Validation and gate split have between half of and twice their fraction of the rows. Warns only.",
        blocking=False,
    ),
    _spec(
        "contamination",
        "Share of training rows that contain 13 words in a row of a text that models are evaluated on is at most "
        "data.checks.max_contaminated_share. Warns only.",
        blocking=False,
    ),
    _spec(
        "prompt_boundary",
        "Share of training rows whose prompt has other tokens when a server renders it than in training is at most "
        "data.checks.max_changed_prompts_share. Warns only.",
        blocking=False,
    ),
]
LEAST_EXPECTED = 30
"""Minimum expected size of a split, in rows, below which `split_fractions` checks nothing: it varies too much."""


def dataset_checks(
    context: dg.AssetExecutionContext, statistics: dict[str, Any], data: Data
) -> list[dg.AssetCheckResult]:
    """Evaluate all checks in SPECS but `contamination` and `prompt_boundary`.

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
            "are held out, but have a near-duplicate in the training split (data.near_duplicate_threshold)",
        ),
        _left_out(context, statistics, data),
        *_judgements(context, statistics, data),
        _split_fractions(context, statistics, data),
    ]


def _left_out(context: dg.AssetExecutionContext, statistics: dict[str, Any], data: Data) -> dg.AssetCheckResult:
    most, pairs = data.checks.max_left_out_share, statistics.get("first_left_out", [])
    first = "; ".join(f"row {row} repeats row {held_out}" for row, held_out in pairs)
    problem = (
        f"are left out of training as near-duplicates of held-out rows (data.checks.max_left_out_share = {most:g}); "
        f"raise data.near_duplicate_threshold, or set it to null to keep them. First, by number in dolly_raw: {first}"
    )
    count, total = statistics.get("near_duplicates_left_out", 0), statistics.get("drawn", {}).get("train", 0)
    severity = dg.AssetCheckSeverity.WARN
    return fraction_check(context, "left_out", count, total, most, problem, severity=severity, first_rows=first)


def _judgements(
    context: dg.AssetExecutionContext, statistics: dict[str, Any], data: Data
) -> Iterator[dg.AssetCheckResult]:
    """Checks of the pairs and labelled answers, which pass without any."""
    from finetune_assets.data.judgements import length_bias

    most, conflicts = data.checks.max_conflicting_share, statistics.get("first_conflicting", [])
    first = "; ".join(f"row {row} and row {other}" for row, other in conflicts)
    total = sum(statistics.get("pairs", {}).values()) + sum(statistics.get("labelled", {}).values())
    problem = (
        f"contradict another judgement of the same answers (data.checks.max_conflicting_share = {most:g}). First, by "
        f"number in dolly_raw: {first}"
    )
    count = statistics.get("conflicting", 0)
    yield fraction_check(context, "conflicting_judgements", count, total, most, problem, first_rows=first)
    lengths, allowed = statistics.get("judged_tokens", {}), data.checks.max_length_bias
    bias = length_bias(lengths)
    text = (
        f"Preferred answers have {lengths['chosen']:.1f} tokens on average, the others {lengths['rejected']:.1f} "
        f"({bias:+.0%}; data.checks.max_length_bias = {allowed:g})"
        if total
        else "No judgements"
    )
    passed = abs(bias) <= allowed
    if not passed:
        context.log.warning(f"Check length_bias failed: {text}")
    yield dg.AssetCheckResult(
        passed=passed,
        check_name="length_bias",
        severity=dg.AssetCheckSeverity.WARN,
        description=text,
        metadata={"length_bias": bias, **{f"{name}_tokens": mean for name, mean in lengths.items()}},
    )


def _split_fractions(context: dg.AssetExecutionContext, statistics: dict[str, Any], data: Data) -> dg.AssetCheckResult:
    drawn = statistics.get("drawn", {})
    rows, problems = sum(drawn.values()), []
    for split, setting, fraction in (
        ("val", "data.val_fraction", data.val_fraction),
        ("gate", "data.gate_fraction", data.gate_fraction),
    ):
        share = drawn.get(split, 0) / rows if rows else fraction
        if fraction * rows >= LEAST_EXPECTED and not fraction / 2 <= share <= fraction * 2:
            problems.append(f"{share:.1%} of {rows:,} rows are in the split {split} ({setting} = {fraction:g})")
    if problems:
        frequent, prompt = statistics["most_frequent_prompt_rows"], statistics["most_frequent_prompt"]
        problems.append(
            f"all rows with the same prompt are in one split; the most frequent, {prompt!r}, has {frequent:,} rows"
        )
        context.log.warning(f"Check split_fractions failed: {'; '.join(problems)}")
    return dg.AssetCheckResult(
        passed=not problems,
        check_name="split_fractions",
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(problems) or "The splits have their fractions of the rows",
        metadata={f"{split}_rows": count for split, count in drawn.items()},
    )
