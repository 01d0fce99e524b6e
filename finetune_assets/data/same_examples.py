"""Compares tokenized datasets."""

from itertools import zip_longest
from pathlib import Path

import pyarrow as pa

FILES = ("train.arrow", "val.arrow", "gate.arrow", "packs.arrow")


def same_examples(folder: Path, other: Path) -> bool:
    """Whether two tokenized datasets have exactly the same examples and packs, in the same order."""
    return all(_same(folder / name, other / name) for name in FILES)


def _same(path: Path, other: Path) -> bool:
    if not path.exists() or not other.exists():
        return path.exists() == other.exists()
    with pa.ipc.open_stream(pa.memory_map(str(path))) as ours, pa.ipc.open_stream(pa.memory_map(str(other))) as theirs:
        return all(batch is not None and batch.equals(another) for batch, another in zip_longest(ours, theirs))
