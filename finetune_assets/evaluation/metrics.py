"""How answers are judged."""

import re


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are the same but for case, white space and a final full stop."""
    return _folded(answer) == _folded(expected)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


class _Words:
    """Words of any script; rouge_score's own knows ASCII alone and gives all others 0."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())


class RougeL:
    """ROUGE-L (Lin 2004): the F-measure of the longest common subsequence of words, from 0 to 1."""

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer  # a second, which exact_match need not take

        self.scorer = RougeScorer(["rougeL"], tokenizer=_Words())

    def __call__(self, answer: str, expected: str) -> float:
        return float(self.scorer.score(expected, answer)["rougeL"].fmeasure)
