"""How answers are judged."""

import pytest

from finetune_assets.evaluation.metrics import RougeL, exact_match


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
    ],
)
def test_rouge_l(answer: str, expected: str, f: float) -> None:
    assert RougeL()(answer, expected) == pytest.approx(f)


def test_exact_match() -> None:
    assert exact_match(" The  Issel. ", "the issel")
    assert not exact_match("Issel", "the Issel")
