"""Best-fit-decreasing bin packing of examples into sequences of equal length."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack(lengths: Sequence[int] | NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Assign every example to a pack so that no pack holds more than `capacity` tokens.

    Examples are placed longest first, each into the fullest pack with enough space. Packs with equal remaining space
    share a stack, and the bits of one integer mark the spaces that occur, so finding the best pack is a bit operation.

    Args:
        lengths: Number of tokens of each example, from 1 to `capacity`.
        capacity: Maximum number of tokens per pack.

    Returns:
        Indices into `lengths`, pack by pack; packs are sorted by their first example.

    Raises:
        ValueError: if an example is longer than a pack.
    """
    packs: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    for example in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[example])
        if not 0 < length <= capacity:
            raise ValueError(f"example {example} has {length} tokens, expected 1 to {capacity}")
        fitting = occupied >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                occupied &= ~(1 << space)
            packs[chosen].append(example)
        else:
            space, chosen = capacity, len(packs)
            packs.append([example])
        left = space - length
        by_space[left].append(chosen)
        if left:
            occupied |= 1 << left
    return sorted((sorted(members) for members in packs), key=lambda members: members[0])


def sequences_of(rows: Sequence[int] | NDArray[np.int64], pairs: bool) -> list[list[int]]:
    """Examples of each sequence without packing: both answers of a pair together, any other example alone.

    Args:
        rows: Number of each example's row. The answers of a pair are adjacent, and have one number.
        pairs: Whether the answers of a pair are learned together; see `Learning.pairs`.
    """
    if not pairs:
        return [[example] for example in range(len(rows))]
    rows = np.asarray(rows)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    return [members.tolist() for members in np.split(np.arange(len(rows)), starts[1:])] if len(rows) else []
