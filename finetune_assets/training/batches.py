"""Which examples a step takes, as pure functions of seed and step, and how they become tensors.

No attention mask is ever made. Rows are padded on the right, where causal attention does not look, and examples that
share a row are told apart by position ids that begin anew: transformers then masks between them. An attention mask
beside position ids would silently switch that off.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_assets.config.schema import Training
from finetune_assets.data.tokenization import IGNORED
from finetune_assets.errors import UserError

MEGA_BATCH = 50
"""With `group_by_length`: so many global batches are sorted together, as transformers' sampler does."""


class BatchError(UserError):
    """A global batch that cannot be made."""


class Examples:
    """The examples of one Arrow stream, memory-mapped.

    Args:
        path: `train.arrow`, `val.arrow` or `gate.arrow` of a tokenized dataset.
    """

    def __init__(self, path: Path) -> None:
        self.table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.ids, self.labels = self.table["input_ids"], self.table["labels"]
        self.lengths: NDArray[np.int64] = pc.list_value_length(self.ids).to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.table)

    def tokens(self, example: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Ids and labels of one example; nothing is learned at its first token, which no token predicts."""
        labels = self.labels[example].values.to_numpy(zero_copy_only=False).copy()
        labels[0] = IGNORED
        return self.ids[example].values.to_numpy(zero_copy_only=False), labels


def read_packs(folder: Path) -> list[list[int]] | None:
    """The train examples of each packed sequence, or None if the dataset was not packed."""
    path = folder / "packs.arrow"
    if not path.exists():
        return None
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()["examples"].to_pylist()


@dataclass(frozen=True)
class Batch:
    """One micro-batch on a device.

    Attributes:
        input_ids: Shape (rows, length), int64.
        labels: Same shape; `IGNORED` where nothing is learned.
        position_ids: Same shape, beginning anew at each example; None where every row is one example.
        tokens: Tokens that are not padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    tokens: int


def collate(sequences: list[list[int]], examples: Examples, device: torch.device) -> Batch:
    """Put each sequence's examples end to end into a row; what is left of a row is padding, an example of its own."""
    parts = [[examples.tokens(example) for example in sequence] for sequence in sequences]
    filled = [sum(len(ids) for ids, _ in row) for row in parts]
    shape = (len(parts), max(filled))
    ids = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    positions = np.zeros(shape, np.int64)
    for row, members in enumerate(parts):
        at = 0
        for member_ids, member_labels in members:
            end = at + len(member_ids)
            ids[row, at:end], labels[row, at:end] = member_ids, member_labels
            positions[row, at:end] = np.arange(end - at)
            at = end
        positions[row, at:] = np.arange(shape[1] - at)
    packed = any(len(members) > 1 for members in parts)
    return Batch(
        torch.from_numpy(ids).to(device, non_blocking=True),
        torch.from_numpy(labels).to(device, non_blocking=True),
        torch.from_numpy(positions).to(device, non_blocking=True) if packed else None,
        sum(filled),
    )


class TrainOrder:
    """The sequences of every step: a permutation an epoch, cut into global batches, shared among processes.

    Args:
        lengths: Tokens of each sequence.
        training: The training settings.
        world: How many processes share a global batch.

    Raises:
        BatchError: if there are fewer sequences in a global batch than processes.
    """

    def __init__(self, lengths: NDArray[np.int64], training: Training, by_length: bool, world: int) -> None:
        self.lengths = lengths
        self.seed, self.by_length, self.world = training.seed, by_length, world
        self.macro, self.micro = training.macro_batch_size, training.micro_batch_size
        if self.macro < world:
            raise BatchError(
                f"training.macro_batch_size: {self.macro} sequences cannot be shared by {world} processes; raise it to "
                f"at least {world}, or set training.processes_per_node to at most {self.macro}"
            )
        self.steps_per_epoch = math.ceil(len(lengths) / self.macro)
        self.steps = training.max_steps or math.ceil(training.epochs * self.steps_per_epoch)
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """The sequences of one optimizer step, over all processes; the last of an epoch may be smaller."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][at * self.macro : (at + 1) * self.macro]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """One process's share of a step, longest sequences first, in micro-batches."""
        batch = self.global_batch(step)
        share = batch[np.argsort(-self.lengths[batch], kind="stable")][rank :: self.world]
        return [share[at : at + self.micro].tolist() for at in range(0, len(share), self.micro)]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.lengths))
        if not self.by_length:
            return order
        size = self.macro * MEGA_BATCH
        grouped = [
            chunk[np.argsort(-self.lengths[chunk], kind="stable")]
            for chunk in np.split(order, range(size, len(order), size))
        ]
        order = np.concatenate(grouped)
        whole = len(order) // self.macro * self.macro
        batches = order[:whole].reshape(-1, self.macro)
        return np.concatenate([batches[rng.permutation(len(batches))].ravel(), order[whole:]])


def evaluation_batches(examples: Examples, process_rank: int, world: int, rows: int) -> list[list[list[int]]]:
    """One process's share of a split, longest first, `rows` examples a batch, each a sequence of its own."""
    share = np.argsort(-examples.lengths, kind="stable")[process_rank::world].tolist()
    return [[[example] for example in share[at : at + rows]] for at in range(0, len(share), rows)]
