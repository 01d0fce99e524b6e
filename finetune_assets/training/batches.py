"""Collation of the examples of a step into tensors.

No attention mask is ever created. Where the attention implementation accepts boundaries, a batch is one row of
concatenated examples with the boundaries between them. Otherwise a batch has rows padded on the right, which causal
attention ignores; examples that share a row are separated by position ids that restart at zero, from which transformers
builds a mask. Passing an attention mask of ones together with position ids would silently disable that mask.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_assets.data.labels import IGNORED
from finetune_assets.training.order import Examples


@dataclass(frozen=True)
class Batch:
    """A micro-batch on a device.

    Attributes:
        input_ids: Shape (rows, length), int64.
        position_ids: Same shape, restarting at zero for each example; None if every row is a single example.
        boundaries: Start of each example in a single flat row, and the end of the last; shape (examples + 1,), int32.
            None for padded rows.
        longest: Length of the longest example, in tokens.
        learned: Indices into the flattened rows of the positions with a target; shape (learned,), int64.
        targets: Next token of each of these positions; same shape.
        tokens: Number of tokens, padding excluded.
        examples: Indices of the examples, in order.
        counts: Number of target tokens of each of them.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    boundaries: Tensor | None
    longest: int
    learned: Tensor
    targets: Tensor
    tokens: int
    examples: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model. With a cache, transformers would treat packed examples as a single one."""
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        if self.boundaries is None:
            return inputs
        ends, longest = self.boundaries, self.longest
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return {**inputs, **lengths}


def collate(sequences: list[list[int]], examples: Examples, device: torch.device, flat: bool = False) -> Batch:
    """Concatenate examples into the rows of a batch.

    Args:
        sequences: Example indices of each sequence.
        examples: Dataset that the indices refer to.
        device: Device of the batch.
        flat: Put all examples into one row without padding, with boundaries. Otherwise each sequence is a row, padded
            on the right; the padding counts as a separate example.
    """
    rows = [[example for sequence in sequences for example in sequence]] if flat else sequences
    parts = [[examples.tokens(example) for example in row] for row in rows]
    filled = [sum(len(ids) for ids, _ in row) for row in parts]
    shape = (len(parts), max(filled))
    ids, labels, positions = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64), np.zeros(shape, np.int64)
    for row, members in enumerate(parts):
        at = 0
        for example_ids, example_labels in members:
            end = at + len(example_ids)
            ids[row, at:end], labels[row, at:end] = example_ids, example_labels
            positions[row, at:end] = np.arange(end - at)
            at = end
        positions[row, at:] = np.arange(shape[1] - at)
    following = np.full(shape, IGNORED, np.int64)
    following[:, :-1] = labels[:, 1:]
    learned = np.flatnonzero(following != IGNORED)
    lengths = [len(ids) for row in parts for ids, _ in row]

    def on_device(values: NDArray[Any]) -> Tensor:
        host = torch.from_numpy(values)
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)

    return Batch(
        on_device(ids),
        on_device(positions) if flat or any(len(members) > 1 for members in parts) else None,
        on_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)) if flat else None,
        max(lengths),
        on_device(learned),
        on_device(following.ravel()[learned]),
        sum(filled),
        [example for row in rows for example in row],
        [int((example_labels != IGNORED).sum()) for row in parts for _, example_labels in row],
    )


def shortest_batch(examples: Examples, device: torch.device, flat: bool) -> Batch:
    """A batch of the shortest example, for computations that have all its logits in memory."""
    return collate([[int(examples.lengths.argmin())]], examples, device, flat)
