"""Chooses training examples so that sources have given shares of the tokens."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def choose(
    tokens: NDArray[np.int64], sources: NDArray[np.int64], ranks: NDArray[np.float64], weights: Sequence[float]
) -> NDArray[np.bool_]:
    """Choose as many examples as possible with the sources' tokens in the proportion of the weights.

    The source with the fewest tokens for its weight is used whole; sources without any do not count. Of each other
    source, examples are chosen in the order of their ranks, which depend on content alone, so new rows displace only
    those of higher rank.

    Args:
        tokens: Number of tokens of each example; shape (n,).
        sources: Index of each example's source; shape (n,).
        ranks: Rank of each example in [0, 1); shape (n,).
        weights: Positive weight of each source.

    Returns:
        Mask of the chosen examples; shape (n,).
    """
    totals = np.bincount(sources, tokens, len(weights))
    scale = min((total / weight for total, weight in zip(totals, weights, strict=True) if total), default=0.0)
    chosen = np.zeros(len(tokens), np.bool_)
    for source, weight in enumerate(weights):
        members = np.flatnonzero(sources == source)
        chosen[_up_to(members, tokens, ranks, scale * weight)] = True
    return chosen


def choose_replayed(
    tokens: NDArray[np.int64], replayed: NDArray[np.bool_], ranks: NDArray[np.float64], share: float
) -> NDArray[np.bool_]:
    """Choose replayed examples so that they have a share of all tokens; all other examples are kept.

    Args:
        tokens: Number of tokens of each example; shape (n,).
        replayed: Mask of the examples of earlier versions; shape (n,).
        ranks: Rank of each example in [0, 1); shape (n,).
        share: Share of the replayed tokens, from 0 to below 1. If there are fewer, all of them are chosen.

    Returns:
        Mask of the chosen examples; shape (n,).
    """
    wanted = tokens[~replayed].sum() * share / (1 - share)
    chosen = ~replayed
    chosen[_up_to(np.flatnonzero(replayed), tokens, ranks, wanted)] = True
    return chosen


def _up_to(
    members: NDArray[np.int64], tokens: NDArray[np.int64], ranks: NDArray[np.float64], wanted: float
) -> NDArray[np.int64]:
    """The members of lowest rank whose tokens are together nearest to a number."""
    ordered = members[np.argsort(ranks[members], kind="stable")]
    ends = np.concatenate([[0], np.cumsum(tokens[ordered])])
    return ordered[: int(np.abs(ends - wanted).argmin())]
