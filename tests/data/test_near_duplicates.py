"""Near-duplicate texts: which are found, which are kept apart, and how surely."""

import random

import numpy as np
import pytest

from finetune_assets.data import near_duplicates
from finetune_assets.data.folding import folded, words_of
from finetune_assets.data.near_duplicates import (
    NEIGHBOURS,
    SHINGLE,
    Index,
    Signatures,
    earlier_near_duplicates,
    sign,
    word_sequences,
)


def signed(*texts: str) -> Signatures:
    return sign(words_of(texts), np.arange(len(texts) + 1))


def prose(rng: random.Random, length: int) -> list[str]:
    return [f"w{rng.randrange(10_000)}" for _ in range(length)]


def edited(words: list[str], changes: int, rng: random.Random) -> list[str]:
    """The words with some of them replaced, far enough apart that each change counts."""
    other = list(words)
    for at in rng.sample(range(0, len(words) - SHINGLE, SHINGLE), changes):
        other[at] = f"x{rng.randrange(10_000)}"
    return other


def similarity(one: list[str], other: list[str]) -> float:
    """The Jaccard index of sequences of words, with blanks at both ends."""
    blanks = [""] * (SHINGLE - 1)
    sets = [
        {tuple(text[i : i + SHINGLE]) for i in range(len(text) - SHINGLE + 1)}
        for text in ([*blanks, *one, *blanks], [*blanks, *other, *blanks])
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What is 3 + 4?", "what is 3 + 4"),
        ("  what IS 3+4 ", "what is 3 + 4"),
        ("What is 3 − 4", "what is 3 - 4"),
        ("3 – 4 = ?", "3 - 4 ="),
        ('Say: "Hi, there!"', "say hi there"),
        ("don’t", "don t"),
        ("pi is 3.14, at 12:30", "pi is 3 . 14 at 12 : 30"),
        ("5! is 10!", "5 ! is 10 !"),
        ("Covid19! 1" + "0" * 30 + "!", "covid19 1" + "0" * 30),
        ("a != b; c := d", "a ! = b c : = d"),
        ("f(x) < g[y]", "f ( x ) < g [ y ]"),
        ("50% of $3", "50 % of $ 3"),
        ("今天好。", "今 天 好"),
        ("ｆｕｌｌ width", "full width"),
        ("कि का", "कि का"),
        ("Good 👍", "good 👍"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_words_and_symbols_that_count(text: str, words: str) -> None:
    assert folded(text) == words
    assert words_of([text]).counts.tolist() == [len(words.split())]


def test_hashes_agree_with_folded_text() -> None:
    texts = ["Why?", "why", "WHY !", "why not", "not why", "", "...", "a b", "ab", "x" * 600, "x" * 601]
    hashes, forms = words_of(texts).folded, [folded(text) for text in texts]
    for i, one in enumerate(forms):
        for j, other in enumerate(forms):
            assert (hashes[i] == hashes[j]) == (one == other), (texts[i], texts[j])


def test_a_text_has_the_same_signature_alone_and_among_others() -> None:
    rng = random.Random(0)
    texts = [" ".join(prose(rng, length)) for length in (0, 1, 3, 50, 20_000, 7, 0)]
    together = signed(*texts)
    for number, text in enumerate(texts):
        for ours, others in zip(signed(text), together.take(np.array([number])), strict=True):
            assert np.array_equal(ours, others)


@pytest.mark.parametrize("changes", [1, 3, 6, 12, 25])
def test_similarity_is_estimated_without_bias(changes: int) -> None:
    rng = random.Random(changes)
    errors = []
    for _ in range(60):
        words = prose(rng, 100)
        other = edited(words, changes, rng)
        one, two = signed(" ".join(words), " ".join(other)).minima
        agreeing = np.count_nonzero(one == two) / near_duplicates.PERMUTATIONS
        errors.append((agreeing - 1 / 256) / (1 - 1 / 256) - similarity(words, other))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.06


def test_planted_near_duplicates_are_found_and_others_are_not() -> None:
    rng = random.Random(1)
    originals = [prose(rng, rng.randint(60, 200)) for _ in range(2_000)]
    planted = []
    while len(planted) < 100:
        other = edited(originals[len(planted)], rng.randint(1, 5), rng)
        if 0.85 <= similarity(originals[len(planted)], other) <= 0.95:
            planted.append(other)
    earlier = earlier_near_duplicates(signed(*(" ".join(words) for words in [*originals, *planted])), 0.8)
    assert (earlier[:2_000] == -1).all()
    assert (earlier[2_000:] == np.arange(100)).sum() >= 95


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 + 4?", "What is 3 + 5?"),
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("Solve the problem step by step, and write the number on a line of its own. " * 3 + "It is 37 + 48.",) * 2,
        ("Name the capital of France in one word.", "Name the capital of Spain in one word."),
    ],
)
def test_short_texts_with_another_number_or_word_differ(one: str, other: str) -> None:
    other = other.replace("37 + 48", "37 + 49")
    assert earlier_near_duplicates(signed(one, other), 0.8).tolist() == [-1, -1]


def test_many_texts_of_one_template_are_compared_in_bounded_work() -> None:
    """More texts in each band than neighbours, none of them near-duplicates, and one planted."""
    rng = random.Random(2)
    template = prose(rng, 100)
    texts = [[*template, *prose(rng, 60)] for _ in range(20 * NEIGHBOURS)]
    planted = edited(texts[7], 3, rng)
    signatures = signed(*(" ".join(words) for words in texts))
    rows, groups = Index(signatures, 0.8).find(signed(" ".join(planted), " ".join([*template, *prose(rng, 60)])))
    assert rows.tolist() == [0]
    assert Index(signatures, 0.8).group[7] == groups[0]


def test_what_an_index_finds_does_not_depend_on_the_order() -> None:
    rng = random.Random(3)
    texts = [prose(rng, 60) for _ in range(300)]
    ours = [" ".join(edited(words, rng.randint(1, 6), rng)) for words in texts]
    given = [" ".join(words) for words in texts]
    index, mixed_index = Index(signed(*given), 0.8), Index(signed(*given[::-1]), 0.8)
    found, mixed = index.find(signed(*ours))[0], mixed_index.find(signed(*ours[::-1]))[0]
    assert 50 < len(found) < 300
    assert sorted(299 - mixed) == sorted(found)


def test_equal_texts_share_a_group() -> None:
    index = Index(signed("Why?", "who", "WHY"), 0.8)
    rows, groups = index.find(signed("why!", "where"))
    assert rows.tolist() == [0]
    assert np.flatnonzero(index.group == groups[0]).tolist() == [0, 2]


def test_no_texts() -> None:
    assert earlier_near_duplicates(signed(), 0.8).tolist() == []
    assert Index(signed(), 0.8).find(signed("a"))[0].tolist() == []
    assert Index(signed("a"), 0.8).find(signed())[0].tolist() == []


def test_word_sequences_stay_within_a_text() -> None:
    hashes, texts = word_sequences(words_of(["a b c", "b", "", "b c d"]), 2)
    assert texts.tolist() == [0, 0, 3, 3]
    assert hashes[1] == hashes[2]
    assert len(set(hashes.tolist())) == 3
