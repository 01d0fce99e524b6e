"""Comparisons of log-probabilities that show which adapter a server answered with."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_CORRELATION = 0.9
"""Correlation of the answers' change with that of the right adapter from which a wrong scale is diagnosed."""


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
