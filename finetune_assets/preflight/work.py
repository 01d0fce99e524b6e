"""Exact number of steps and tokens of a training run, computed with the trainer's own batch sampler."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.learning import Learning
from finetune_assets.data.packing import sequences_of
from finetune_assets.training.best_step import FORWARD_SHARE, Selection
from finetune_assets.training.order import Examples, GlobalBatchSampler, read_packs


@dataclass(frozen=True)
class TrainingWork:
    """Exact amount of work of a training run.

    Attributes:
        steps: Number of optimizer steps.
        tokens: Number of tokens read by all processes, excluding padding.
        lengths: Lengths of the examples of the largest micro-batch, in tokens.
        learned: Number of learned tokens in the largest micro-batch.
        evaluations: Number of evaluations before the last step, if the training does not stop early.
        evaluation_share: Estimated time of these evaluations over that of the steps.
        forward_share: Estimated time of the forward passes without gradient that judged answers need, over that of the
            steps: those of the reference, once, and with `kto` those for the divergence.
        fewest_steps: Number of steps if the training stops as early as `training.patience` allows.
    """

    steps: int
    tokens: int
    lengths: list[int]
    learned: int
    evaluations: int = 0
    evaluation_share: float = 0.0
    fewest_steps: int = 0
    forward_share: float = 0.0


def work_of(dataset: Path, experiment: ExperimentConfig, processes: int) -> TrainingWork:
    """Compute steps, tokens and the largest micro-batch for a tokenized dataset."""
    train, packs = Examples.read(dataset / "train.arrow"), read_packs(dataset)
    learning = Learning.of(experiment.training)
    sequences = packs or sequences_of(train.table["row"], learning.pairs)
    lengths = np.array([train.lengths[sequence].sum() for sequence in sequences])
    training, tokens = experiment.training, experiment.data.tokenization
    budget = training.micro_batch_size * learning.sequence_tokens(tokens, packs is not None)
    order = GlobalBatchSampler(lengths, training, training.group_by_length and not packs, processes, budget)
    read, largest = 0, (0, [0])
    for step in range(order.steps):
        read += int(lengths[order.global_batch(step)].sum())
        for rank in range(processes):
            for batch in order.micro_batches(step, rank):
                largest = max(largest, (int(lengths[batch].sum()), batch))
    members = [example for sequence in largest[1] for example in sequences[sequence]]
    val = Examples.read(dataset / "val.arrow")
    validation = int(val.lengths.sum())
    selection = Selection.of(training, validation, lengths)
    evaluations = selection.evaluations(order.steps)
    return TrainingWork(
        order.steps,
        read,
        train.lengths[members].tolist(),
        int(train.learned[members].sum()),
        evaluations,
        FORWARD_SHARE * evaluations * validation / read,
        selection.fewest_steps(order.steps),
        _forward_share(learning, train, val, read),
    )


def _forward_share(learning: Learning, train: Examples, val: Examples, read: int) -> float:
    if not learning.judged:
        return 0.0
    column = "pair" if learning.pairs else "desirable"
    judged = [int(each.lengths[each.table[column].is_valid().to_numpy()].sum()) for each in (train, val)]
    reference = FORWARD_SHARE * sum(judged) / read
    return reference if learning.pairs else 2 * reference + FORWARD_SHARE * judged[0] / int(train.lengths.sum())


def full_batch(experiment: ExperimentConfig) -> tuple[list[int], int]:
    """Return example lengths and number of learned tokens of the largest micro-batch that the settings allow."""
    tokens = experiment.data.tokenization
    length = Learning.of(experiment.training).sequence_tokens(tokens, tokens.packing)
    lengths = [length] * experiment.training.micro_batch_size
    return lengths, sum(lengths)
