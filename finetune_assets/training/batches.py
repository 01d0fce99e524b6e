"""How the examples of a step become tensors.

No attention mask is ever made. A batch is one row of examples end to end, with the boundaries between them, where the
attention takes those. Elsewhere it is padded rows: on the right, where causal attention does not look, and examples
that share a row are told apart by position ids that begin anew, from which transformers makes a mask between them. An
attention mask of ones beside position ids would silently switch that off.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_assets.data.labels import IGNORED
from finetune_assets.training.order import Examples


@dataclass(frozen=True)
class Batch:
    """One micro-batch on a device.

    Attributes:
        input_ids: Shape (rows, length), int64.
        position_ids: Same shape, beginning anew at each example; None where every row is one example.
        boundaries: Where the examples of the one row begin, and the end of the last: shape (examples + 1,), int32. None
            where there are several rows.
        longest: Tokens of the longest example.
        learned: Places in the flattened rows whose next token is learned; shape (learned,), int64.
        targets: Those next tokens; same shape.
        tokens: Tokens that are not padding.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    boundaries: Tensor | None
    longest: int
    learned: Tensor
    targets: Tensor
    tokens: int

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model is called with. A cache would make transformers take packed examples for one."""
        found = {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        if self.boundaries is None:
            return found
        ends, longest = self.boundaries, self.longest
        return {**found, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def collate(sequences: list[list[int]], examples: Examples, device: torch.device, flat: bool = False) -> Batch:
    """Put examples end to end into rows.

    Args:
        sequences: The examples of each row.
        examples: Where they are.
        device: Where the batch goes.
        flat: All in one row without padding, with boundaries. Else a row a sequence, what is left of it padding, which
            is an example of its own.
    """
    rows = [[example for sequence in sequences for example in sequence]] if flat else sequences
    parts = [[examples.tokens(example) for example in row] for row in rows]
    filled = [sum(len(ids) for ids, _ in row) for row in parts]
    shape = (len(parts), max(filled))
    ids, labels, positions = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64), np.zeros(shape, np.int64)
    for row, members in enumerate(parts):
        at = 0
        for member_ids, member_labels in members:
            end = at + len(member_ids)
            ids[row, at:end], labels[row, at:end] = member_ids, member_labels
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
    )
