"""The order of the data: every sequence once an epoch, alike for any number of processes; and what a batch learns."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from training.measuring import names

from finetune_assets.config.schema import Training
from finetune_assets.training.batches import collate
from finetune_assets.training.order import BatchError, Examples, GlobalBatchSampler

LENGTHS = np.random.default_rng(0).integers(1, 500, 1_003)


def order(
    world: int = 1, by_length: bool = False, lengths: np.ndarray = LENGTHS, **settings: object
) -> GlobalBatchSampler:
    training = Training(**{"macro_batch_size": 32, "micro_batch_size": 4, "epochs": 2, **settings})  # type: ignore
    return GlobalBatchSampler(lengths, training, by_length, world)


@pytest.mark.parametrize("by_length", [False, True])
def test_every_sequence_once_an_epoch(by_length: bool) -> None:
    made = order(by_length=by_length)
    assert (made.steps_per_epoch, made.steps) == (32, 64)
    for epoch in (0, 1):
        steps = range(epoch * 32, epoch * 32 + 32)
        seen = Counter(i for step in steps for i in made.global_batch(step).tolist())
        assert seen == Counter(range(1_003))


def test_epochs_differ_and_seeds_differ() -> None:
    made, other = order(), order(seed=7)
    assert not np.array_equal(made.global_batch(0), made.global_batch(32))
    assert not np.array_equal(made.global_batch(0), other.global_batch(0))


@pytest.mark.parametrize("world", [1, 2, 3, 5, 32])
def test_processes_share_a_global_batch_without_loss(world: int) -> None:
    made = order(world)
    for step in (0, 31, 40):
        shared = [i for rank in range(world) for micro in made.micro_batches(step, rank) for i in micro]
        assert Counter(shared) == Counter(order().global_batch(step).tolist())
        assert all(len(micro) <= 4 for rank in range(world) for micro in made.micro_batches(step, rank))


def test_steps_can_be_asked_for_in_any_order() -> None:
    made = order()
    late = made.global_batch(40).copy()
    made.global_batch(3)
    assert np.array_equal(made.global_batch(40), late)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 32), (0.5, 16), (1.5, 48), (0.01, 1)])
def test_epochs_become_steps(epochs: float, steps: int) -> None:
    assert order(epochs=epochs).steps == steps


def test_max_steps_wins() -> None:
    assert order(max_steps=5).steps == 5


def test_grouping_by_length_pads_little() -> None:
    """On lengths as Dolly's; random batches of the same size pad about half."""

    def padding(by_length: bool) -> float:
        lengths = np.minimum(2_000, np.random.default_rng(1).lognormal(4.5, 0.9, 5_000).astype(int) + 1)
        made = order(by_length=by_length, lengths=lengths, epochs=1)
        steps = [micro for step in range(made.steps) for micro in made.micro_batches(step, 0)]
        places = sum(len(micro) * int(lengths[micro].max()) for micro in steps)
        return 1 - lengths.sum() / places

    assert padding(True) < 0.05
    assert padding(True) < padding(False) / 2


def test_too_small_a_batch_for_the_processes_is_refused() -> None:
    with pytest.raises(BatchError) as error:
        order(world=4, macro_batch_size=2, micro_batch_size=1)
    assert names(error, "training.macro_batch_size", 2, "training.processes_per_node", 4)


@pytest.mark.parametrize("flat", [True, False])
def test_no_example_predicts_the_first_token_of_the_next(flat: bool) -> None:
    """Where prompts are learned too, which have targets from their first token on."""
    tokens = pa.array([[1, 2, 3], [4, 5], [6]], pa.list_(pa.int32()))
    examples = Examples(pa.table({"input_ids": tokens, "labels": tokens}))
    batch = collate([[0, 1, 2]], examples, torch.device("cpu"), flat)
    assert batch.targets.tolist() == [2, 3, 5]
    assert batch.counts == examples.learned.tolist() == [2, 1, 0]
