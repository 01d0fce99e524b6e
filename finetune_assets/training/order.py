"""Selection of the examples of each step, as a pure function of seed and step. Imported by planning, without torch."""

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
"""Number of global batches that `group_by_length` sorts together, as in transformers' sampler."""


class BatchError(UserError):
    """The global batch cannot be divided among the processes."""


class Examples:
    """Tokenized examples with labels.

    Args:
        table: Table with at least the columns `input_ids` and `labels`.
    """

    @staticmethod
    def read(path: Path) -> "Examples":
        """Memory-map `train.arrow`, `val.arrow` or `gate.arrow` of a tokenized dataset."""
        return Examples(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.ids, self.labels = self.table["input_ids"], self.table["labels"]
        self.lengths: NDArray[np.int64] = pc.list_value_length(self.ids).to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def learned(self) -> NDArray[np.int64]:
        """Number of target tokens of each example."""
        counts = [np.zeros(0, np.int64)]
        for chunk in self.labels.chunks:
            flat = chunk.flatten().to_numpy(zero_copy_only=False) != IGNORED
            until = np.concatenate([[0], np.cumsum(flat)])
            ends = np.concatenate([[0], np.cumsum(pc.list_value_length(chunk).to_numpy())])
            firsts = ends[:-1]
            counts.append(until[ends[1:]] - until[firsts] - flat[firsts])
        return np.concatenate(counts)

    def tokens(self, example: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids and labels of an example; the first label is ignored, because no token precedes it."""
        labels = self.labels[example].values.to_numpy(zero_copy_only=False).copy()
        labels[0] = IGNORED
        return self.ids[example].values.to_numpy(zero_copy_only=False), labels


def read_packs(folder: Path) -> list[list[int]] | None:
    """Read the train examples of each packed sequence; None if the dataset is not packed."""
    path = folder / "packs.arrow"
    if not path.exists():
        return None
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()["examples"].to_pylist()


class GlobalBatchSampler:
    """Sampler of global batches: one permutation per epoch, cut into global batches and divided among processes.

    Args:
        lengths: Length of each sequence, in tokens.
        training: The training settings.
        by_length: Whether to group sequences of similar length into a global batch.
        world: Number of processes that share a global batch.
        budget: Maximum tokens of a micro-batch; None for `micro_batch_size` sequences per micro-batch, one per row.

    Raises:
        BatchError: if a global batch has fewer sequences than processes.
    """

    def __init__(
        self, lengths: NDArray[np.int64], training: Training, by_length: bool, world: int, budget: int | None = None
    ) -> None:
        self.lengths, self.budget = lengths, budget
        self.seed, self.by_length, self.world = training.seed, by_length, world
        self.macro, self.micro = training.macro_batch_size, training.micro_batch_size
        if self.macro < world:
            raise BatchError(
                f"training.macro_batch_size: {self.macro} sequences cannot be divided among {world} processes; "
                f"raise it to at least {world}, or set training.processes_per_node to at most {self.macro}"
            )
        self.steps_per_epoch = math.ceil(len(lengths) / self.macro)
        self.steps = training.max_steps or math.ceil(training.epochs * self.steps_per_epoch)
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """Sequences of an optimizer step, over all processes; the last batch of an epoch may be smaller."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][at * self.macro : (at + 1) * self.macro]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """Micro-batches of one process for a step, longest sequences first."""
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
    """Split sequences into micro-batches of at most `budget` tokens; without a budget, of `rows` sequences in order."""
    if budget:
        return [sequences[members].tolist() for members in pack(lengths[sequences], budget)]
    return [sequences[at : at + rows].tolist() for at in range(0, len(sequences), rows)]


def evaluation_batches(
    examples: Examples, world: int, rows: int, budget: int | None, sequences: list[list[int]] | None = None
) -> list[list[list[list[int]]]]:
    """Batches of each process over all sequences, longest first.

    Args:
        examples: The examples.
        world: Number of processes.
        rows: Maximum number of sequences of a batch without a budget.
        budget: Maximum tokens of a batch.
        sequences: Examples of each sequence; by default, each example is a sequence.
    """
    members = [[example] for example in range(len(examples))] if sequences is None else sequences
    lengths = examples.lengths if sequences is None else np.array([examples.lengths[each].sum() for each in members])
    order = np.argsort(-lengths, kind="stable")
    return [
        [[members[index] for index in batch] for batch in split(order[rank::world], lengths, rows, budget)]
        for rank in range(world)
    ]
