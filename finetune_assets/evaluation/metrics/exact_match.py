"""Exact match: equal answers."""

from finetune_assets.evaluation.metrics.metric import AnswerMetric


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are equal up to case, white space and final full stops."""
    return _normalized(answer) == _normalized(expected)


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


EXACT_MATCH = AnswerMetric("exact_match", "exact match", "{:.1%}", exact_match)
