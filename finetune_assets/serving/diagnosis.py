"""Comparisons of log-probabilities that show which adapter a server answered with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune_assets.serving.vllm import Generated, Scored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_CORRELATION = 0.9
"""Correlation of the answers' change with that of the right adapter from which a wrong scale is diagnosed."""
NOT_AMONG_ALTERNATIVES = 10.0
"""Difference in nats for a token that is not among the most probable ones."""


def sums(scored: Sequence[Scored], learned: Sequence[Sequence[int]]) -> "NDArray[np.float64]":
    """Summed log-probability of the learned tokens of each row; shape (rows,)."""
    import numpy as np

    return np.array([sum(row.tokens[at] for at in positions) for row, positions in zip(scored, learned, strict=True)])


def projection(answered: "NDArray[np.float64]", start: "NDArray[np.float64]", end: "NDArray[np.float64]") -> float:
    """How far the answers are on the way from one model to another: 0 at `start`, 1 at `end`.

    Noise of single rows averages out, so it distinguishes models that differ by less than the noise of one row.
    """
    way = end - start
    return float(way @ (answered - start) / (way @ way))


def scale_of(
    answered: "NDArray[np.float64]", base: "NDArray[np.float64]", expected: "NDArray[np.float64]"
) -> float | None:
    """Approximate factor by which an adapter's update is scaled; None if the answers are not those of a scaled one."""
    import numpy as np

    change, right = answered - base, expected - base
    lengths = float(np.linalg.norm(change) * np.linalg.norm(right))
    if not lengths or float(change @ right) / lengths < LEAST_CORRELATION:
        return None
    return projection(answered, base, expected)


def first_differences(generated: Sequence[Generated], scored: Sequence[Scored], starts: Sequence[int]) -> float:
    """Mean difference of the first generated tokens' log-probabilities from the scored ones at the same positions."""
    differences = []
    for answer, row, start in zip(generated, scored, starts, strict=True):
        expected = row.alternatives[start].get(answer.token)
        differences.append(NOT_AMONG_ALTERNATIVES if expected is None else abs(answer.logprob - expected))
    return sum(differences) / len(differences)
