"""Token F1: words that two answers have in common, in any order."""

import re
from collections import Counter

from finetune_assets.evaluation.metrics.metric import AnswerMetric


def token_f1(answer: str, expected: str) -> float:
    """Compute the harmonic mean of precision and recall of the answer's words, from 0 to 1.

    As in SQuAD (Rajpurkar et al. 2016), except that articles count, because they are English only.
    """
    words, expected_words = _words(answer), _words(expected)
    common = (words & expected_words).total()
    if not words and not expected_words:
        return 1.0
    return 2 * common / (words.total() + expected_words.total())


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.casefold()))


TOKEN_F1 = AnswerMetric("token_f1", "token F1", "{:.3f}", token_f1)
