"""Packing loses nothing and fills well."""

import random

import pytest

from finetune_assets.data.packing import pack


@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_in_one_pack_that_holds_it(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.choice([8, 64, 512])
    lengths = [rng.randint(1, capacity) for _ in range(rng.choice([1, 7, 500]))]
    packs = pack(lengths, capacity)
    assert sorted(example for members in packs for example in members) == list(range(len(lengths)))
    assert max(sum(lengths[example] for example in members) for members in packs) <= capacity


@pytest.mark.parametrize("seed", range(5))
def test_each_example_went_where_it_fitted_best(seed: int) -> None:
    """The plain definition of best-fit decreasing, quadratic, leaves the same spaces."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(300)]
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= length
        else:
            spaces.append(60 - length)
    left = [60 - sum(lengths[example] for example in members) for members in pack(lengths, 60)]
    assert sorted(left) == sorted(spaces)


def test_dolly_like_lengths_fill_the_packs() -> None:
    rng = random.Random(0)
    lengths = [min(512, int(rng.lognormvariate(4.5, 0.9)) + 1) for _ in range(5_000)]
    packs = pack(lengths, 512)
    assert sum(lengths) / (512 * len(packs)) > 0.98


def test_too_long_an_example_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens"):
        pack([3, 9], 8)


def test_nothing_packs_to_nothing() -> None:
    assert pack([], 8) == []
