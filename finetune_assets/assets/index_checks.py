"""Asset checks of `retrieval_index`."""

import heapq
import warnings
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from finetune_assets.artifacts.document_lineage import DocumentLineage, rows_with_context
from finetune_assets.assets.materialization import fraction_check
from finetune_assets.assets.partitions import experiments
from finetune_assets.errors import UserError

if TYPE_CHECKING:
    from finetune_assets.retrieval.index import Index

SHOWN = 5
"""Maximum number of passages, documents or rows that a check names."""
SHOWN_CHARACTERS = 80


def _spec(name: str, description: str, blocking: bool = True) -> dg.AssetCheckSpec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitions_def
        return dg.AssetCheckSpec(
            name, asset="retrieval_index", blocking=blocking, partitions_def=experiments, description=description
        )


SPECS = [
    _spec("empty", "Share of documents without text is at most checks.max_empty_share."),
    _spec(
        "near_duplicates",
        "Share of passages that are near-duplicates of an earlier one is at most checks.max_near_duplicate_share. "
        "Warns only.",
        blocking=False,
    ),
    _spec(
        "long_passages",
        "Share of passages of at least checks.long_words words is at most checks.max_long_share. Warns only.",
        blocking=False,
    ),
    _spec(
        "hit",
        "For the raw data's questions whose golden passage is known, the index finds it among the first checks.k "
        "passages in at least the share checks.min_hit.",
    ),
]
WARN = dg.AssetCheckSeverity.WARN


def index_checks(
    context: dg.AssetExecutionContext, documents: DocumentLineage, folder: Path
) -> tuple[list[dg.AssetCheckResult], dict[str, Any]]:
    """Evaluate all checks in SPECS.

    Args:
        context: Context of the asset step; failures are written to its log.
        documents: The document set.
        folder: Folder of its index.

    Returns:
        The results, and what the check `hit` measured, as metadata of the asset.
    """
    from finetune_assets.retrieval.index import open_index, read_description

    described, allowed = read_description(folder), documents.config.checks
    statistics, repeated = described["statistics"], described["near_duplicates"]
    index = open_index(folder)
    long = (index.passages.words >= allowed.long_words).nonzero()[0]
    pairs = "; ".join(f"{_passage(index, ours)} repeats {_passage(index, other)}" for ours, other in repeated["first"])
    first_long = "; ".join(_passage(index, int(number)) for number in long[:SHOWN])
    hit, measured = _hit(context, documents, index)
    return [
        fraction_check(
            context,
            "empty",
            statistics["empty_documents"],
            statistics["documents"],
            allowed.max_empty_share,
            f"have no text (checks.max_empty_share = {allowed.max_empty_share:g}): "
            f"{', '.join(statistics['first_empty'][:SHOWN])}",
            unit="documents",
        ),
        fraction_check(
            context,
            "near_duplicates",
            repeated["passages"],
            len(index.passages),
            allowed.max_near_duplicate_share,
            "are near-duplicates of an earlier one, and take its place among the retrieved "
            f"(checks.max_near_duplicate_share = {allowed.max_near_duplicate_share:g}): {pairs}",
            severity=WARN,
            unit="passages",
        ),
        fraction_check(
            context,
            "long_passages",
            len(long),
            len(index.passages),
            allowed.max_long_share,
            f"have {allowed.long_words:,} words or more (checks.long_words; checks.max_long_share = "
            f"{allowed.max_long_share:g}); split documents by tokens: {first_long}",
            severity=WARN,
            unit="passages",
        ),
        hit,
    ], measured


def _passage(index: "Index", number: int) -> str:
    text = " ".join(index.passages.texts[number].split())
    return f"{index.passages.sources[number]} ({text[:SHOWN_CHARACTERS]!r})"


def _hit(
    context: dg.AssetExecutionContext, documents: DocumentLineage, index: "Index"
) -> tuple[dg.AssetCheckResult, dict[str, Any]]:
    """Search for the questions of the raw data, and compare what is found with their golden passages."""
    from finetune_assets.data.tables import rows_table
    from finetune_assets.retrieval.golden import golden_passages
    from finetune_assets.retrieval.metrics import MOST_RANK, hit_rate, rank_of

    allowed = documents.config.checks
    try:
        rows = _chosen_rows(documents)
    except UserError as e:
        return dg.AssetCheckResult(passed=True, check_name="hit", description=f"Not measured: {e}"), {}
    golden = [golden_passages(index.passages, text) for _, text, _ in rows]
    known = [number for number, passages in enumerate(golden) if passages]
    missing = [rows[number][0] for number, passages in enumerate(golden) if not passages]
    found = index.search([rows[number][0] for number in known], max(MOST_RANK, allowed.k))
    ranks = [rank_of((hit.passage for hit in hits), golden[number]) for number, hits in zip(known, found, strict=True)]
    ks = sorted({1, 3, MOST_RANK, allowed.k})
    total = hit_rate(ranks, ks)
    by_category: dict[str, list[int | None]] = defaultdict(list)
    for number, rank in zip(known, ranks, strict=True):
        by_category[rows[number][2]].append(rank)
    table = [
        {"category": category, "rows": rates.queries, "MRR": f"{rates.mrr:.3f}"}
        | {f"hit@{k}": f"{rates.hits[k]:.3f}" for k in ks}
        for category, rates in sorted((name, hit_rate(of_it, ks)) for name, of_it in by_category.items())
    ]
    measured: dict[str, Any] = {
        "rows_with_golden_passage": len(known),
        "rows_without_golden_passage": len(missing),
        **({f"hit_at_{k}": total.hits[k] for k in ks} | {"mrr": total.mrr} if known else {}),
    }
    share = total.hits[allowed.k]
    passed = not known or share >= allowed.min_hit
    text = (
        f"hit@{allowed.k} is {share:.3f} for {len(known):,} rows, MRR {total.mrr:.3f} "
        f"(checks.min_hit = {allowed.min_hit:g})"
        if known
        else "No row of the raw data has a golden passage in the documents"
    )
    if missing:
        text += f"; {len(missing):,} rows have a context that is no passage, such as {missing[0][:SHOWN_CHARACTERS]!r}"
    (context.log.info if passed else context.log.error)(f"Check hit: {text}")
    columns = ["category", "rows", *(f"hit@{k}" for k in ks), "MRR"]
    tables = {"hit_by_category": dg.MetadataValue.md(rows_table(table, columns))} if known else {}
    result = dg.AssetCheckResult(passed=passed, check_name="hit", description=text, metadata=measured | tables)
    return result, measured | tables


def _chosen_rows(documents: DocumentLineage) -> list[tuple[str, str, str]]:
    """Instruction, context and category of up to `checks.rows` rows of the raw data, chosen by content."""
    from finetune_assets.data.rows import draw

    salt = documents.raw.config.split_salt
    ranked = ((draw(row[0], row[1], salt).rank, *row) for row in rows_with_context(documents.raw))
    return [row[1:] for row in heapq.nsmallest(documents.config.checks.rows, ranked)]
