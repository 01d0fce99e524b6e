"""Which examples a mixture of sources uses."""

import numpy as np
import pytest

from finetune_assets.data.mixture import choose, choose_replayed


def drawn(seed: int, *counts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Tokens, sources and ranks of so many examples of each source."""
    random = np.random.default_rng(seed)
    sources = np.repeat(np.arange(len(counts)), counts)
    return random.integers(5, 300, len(sources)), sources, random.random(len(sources))


@pytest.mark.parametrize("weights", [(90.0, 10.0), (0.9, 0.1), (1.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("counts", [(2000, 2000), (500, 4000), (4000, 500)])
def test_tokens_have_the_proportion_of_the_weights(weights: tuple[float, float], counts: tuple[int, int]) -> None:
    tokens, sources, ranks = drawn(1, *counts)
    chosen = choose(tokens, sources, ranks, weights)
    shares = [tokens[chosen & (sources == source)].sum() / tokens[chosen].sum() for source in range(2)]
    assert shares == pytest.approx([weight / sum(weights) for weight in weights], abs=0.01)
    assert any(chosen[sources == source].all() for source in range(2)), "more could be used"


def test_the_choice_is_by_rank_and_not_by_place() -> None:
    tokens, sources, ranks = drawn(2, 300, 100)
    chosen = choose(tokens, sources, ranks, [1, 1])
    order = np.random.default_rng(3).permutation(len(tokens))
    assert (choose(tokens[order], sources[order], ranks[order], [1, 1]) == chosen[order]).all()
    assert ranks[(sources == 0) & chosen].max() < ranks[(sources == 0) & ~chosen].min()


def test_three_sources_of_which_one_is_tiny() -> None:
    tokens, sources, ranks = drawn(4, 3000, 3000, 40)
    chosen = choose(tokens, sources, ranks, [1, 1, 0.02])
    assert chosen[sources == 2].sum() == pytest.approx(40, abs=1)
    assert 0.01 == pytest.approx(tokens[chosen & (sources == 2)].sum() / tokens[chosen].sum(), abs=0.001)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_replayed_tokens_have_their_share(share: float) -> None:
    tokens, sources, ranks = drawn(5, 1000, 3000)
    chosen = choose_replayed(tokens, sources == 1, ranks, share)
    assert chosen[sources == 0].all()
    assert tokens[chosen & (sources == 1)].sum() / tokens[chosen].sum() == pytest.approx(share, abs=0.005)


def test_too_few_replayed_tokens_are_all_used() -> None:
    tokens, sources, ranks = drawn(6, 1000, 10)
    assert choose_replayed(tokens, sources == 1, ranks, 0.5).all()


def test_a_source_without_tokens_takes_none_from_the_others() -> None:
    tokens, sources, ranks = drawn(7, 500, 0)
    assert choose(tokens, sources, ranks, [0.8, 0.2]).all()
