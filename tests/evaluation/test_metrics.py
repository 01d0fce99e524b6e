"""How answers are judged."""

import random
from functools import cache

import pytest

from finetune_assets.evaluation.metrics.exact_match import exact_match
from finetune_assets.evaluation.metrics.rouge_l import longest_common_subsequence, rouge_l


@pytest.mark.parametrize(
    ("answer", "expected", "f"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("the cat", "the dog", 0.5),
        ("a b c d", "d c b a", 0.25),
        ("Oslo.", "oslo", 1.0),
        ("", "Oslo", 0.0),
        ("река Исель", "Река Исель", 1.0),
        ("東京", "東京", 1.0),
        # What rouge_score 0.1.2 gives for `score(expected, answer)["rougeL"].fmeasure`
        ("the cat was found under the bed", "the cat was under the bed", 0.923076923076923),
        ("the tiny little cat was found under the big funny bed", "the cat was under the bed", 0.7058823529411764),
        ("police killed the gunman", "the gunman kill police", 0.5),
    ],
)
def test_rouge_l(answer: str, expected: str, f: float) -> None:
    assert rouge_l(answer, expected) == pytest.approx(f)


def test_longest_common_subsequence_is_that_of_its_definition() -> None:
    @cache
    def longest(first: tuple[str, ...], second: tuple[str, ...]) -> int:
        if not first or not second:
            return 0
        if first[0] == second[0]:
            return 1 + longest(first[1:], second[1:])
        return max(longest(first[1:], second), longest(first, second[1:]))

    words = random.Random(0)
    for _ in range(200):
        first, second = (tuple(words.choices("abcd", k=words.randrange(12))) for _ in range(2))
        assert longest_common_subsequence([*first], [*second]) == longest(first, second)
    many = [str(number) for number in range(300)]  # more than a machine word of bits
    assert longest_common_subsequence(many, many[::2]) == 150


def test_exact_match() -> None:
    assert exact_match(" The  Issel. ", "the issel")
    assert not exact_match("Issel", "the Issel")
