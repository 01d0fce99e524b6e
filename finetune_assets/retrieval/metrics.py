"""Retrieval metrics: hit@k, and the mean reciprocal rank of the first golden passage."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MOST_RANK = 10
"""Number of passages that are searched for; the reciprocal rank of a later golden passage is 0."""


@dataclass(frozen=True)
class HitRate:
    """How well golden passages are found.

    Attributes:
        queries: Number of queries with a golden passage.
        hits: Fraction of them with a golden passage among the first k, by k.
        mrr: Mean of 1 / rank of the first golden passage.
    """

    queries: int
    hits: dict[int, float]
    mrr: float


def rank_of(retrieved: Iterable[int], golden: Collection[int]) -> int | None:
    """Rank of the first golden passage among retrieved ones, from 1; None if there is none."""
    return next((rank for rank, passage in enumerate(retrieved, 1) if passage in golden), None)


def hit_rate(ranks: Sequence[int | None], ks: Sequence[int] = (1, 3, 10)) -> HitRate:
    """Hit rates of queries.

    Args:
        ranks: Rank of the first golden passage of each query, or None.
        ks: Numbers of passages.
    """
    inverse = np.array([1 / rank if rank else 0.0 for rank in ranks])
    hits = {k: float(np.mean(inverse >= 1 / k)) if ranks else 0.0 for k in ks}
    return HitRate(len(ranks), hits, float(inverse.mean()) if ranks else 0.0)
