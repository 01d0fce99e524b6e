"""Which examples a step takes, as pure functions of seed and step. Planning reads this without torch."""

import math
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from finetune_assets.config.schema import Training
from finetune_assets.data.labels import IGNORED
from finetune_assets.data.packing import pack
from finetune_assets.errors import UserError

MEGA_BATCH = 50
"""With `group_by_length`: so many global batches are sorted together, as transformers' sampler does."""


class BatchError(UserError):
    """A global batch that cannot be made."""


class Examples:
    """Examples as token ids with labels.

    Args:
        table: Of the columns `input_ids` and `labels`, and whatever else.
    """

    @staticmethod
    def read(path: Path) -> "Examples":
        """`train.arrow`, `val.arrow` or `gate.arrow` of a tokenized dataset, memory-mapped."""
        return Examples(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.ids, self.labels = self.table["input_ids"], self.table["labels"]
        self.lengths: NDArray[np.int64] = pc.list_value_length(self.ids).to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def learned(self) -> NDArray[np.int64]:
        """How many tokens of each example are learned."""
        counts = [np.zeros(0, np.int64)]
        for chunk in self.labels.chunks:
            flat = chunk.flatten().to_numpy(zero_copy_only=False) != IGNORED
            until = np.concatenate([[0], np.cumsum(flat)])
            ends = np.concatenate([[0], np.cumsum(pc.list_value_length(chunk).to_numpy())])
            firsts = ends[:-1]
            counts.append(until[ends[1:]] - until[firsts] - flat[firsts])
        return np.concatenate(counts)

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


class GlobalBatchSampler:
    """The sequences of every step: a permutation an epoch, cut into global batches, shared among processes.

    Args:
        lengths: Tokens of each sequence.
        training: The training settings.
        by_length: Whether sequences of like length go into one global batch.
        world: How many processes share a global batch.
        budget: Most tokens of a micro-batch; None for `micro_batch_size` sequences, each in a row of its own.

    Raises:
        BatchError: if there are fewer sequences in a global batch than processes.
    """

    def __init__(
        self, lengths: NDArray[np.int64], training: Training, by_length: bool, world: int, budget: int | None = None
    ) -> None:
        self.lengths, self.budget = lengths, budget
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
        return split(share, self.lengths, self.micro, self.budget)

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


def split(sequences: NDArray[np.int64], lengths: NDArray[np.int64], rows: int, budget: int | None) -> list[list[int]]:
    """Cut sequences into micro-batches of at most `budget` tokens, or without one of `rows` sequences as they come."""
    if budget:
        return [sequences[members].tolist() for members in pack(lengths[sequences], budget)]
    return [sequences[at : at + rows].tolist() for at in range(0, len(sequences), rows)]


def evaluation_batches(examples: Examples, world: int, rows: int, budget: int | None) -> list[list[list[list[int]]]]:
    """Every process's share of all examples, longest first, in batches of sequences of one example each."""
    order = np.argsort(-examples.lengths, kind="stable")
    return [
        [[[example] for example in batch] for batch in split(order[rank::world], examples.lengths, rows, budget)]
        for rank in range(world)
    ]
