"""ROUGE-L: the longest common subsequence of words."""

import re
from collections import defaultdict

from finetune_assets.evaluation.metrics.metric import AnswerMetric


def rouge_l(answer: str, expected: str) -> float:
    """Compute ROUGE-L (Lin 2004): the F-measure of the longest common subsequence of words, from 0 to 1.

    Equal to the rouge_score package for ASCII text. Words of any script count here; the tokenizer of rouge_score drops
    all but ASCII, so other scripts score 0.
    """
    answer_words, expected_words = _words(answer), _words(expected)
    common = longest_common_subsequence(answer_words, expected_words)
    return 2 * common / (len(answer_words) + len(expected_words)) if common else 0.0


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence, by Hyyrö's bit-parallel algorithm (2004).

    Each step processes one word of `second` against all words of `first`.
    """
    positions: defaultdict[str, int] = defaultdict(int)
    for position, word in enumerate(first):
        positions[word] |= 1 << position
    all_bits = unmatched = (1 << len(first)) - 1
    for word in second:
        matched = unmatched & positions[word]
        unmatched = ((unmatched + matched) | (unmatched - matched)) & all_bits
    return len(first) - unmatched.bit_count()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


ROUGE_L = AnswerMetric("rouge_l", "ROUGE-L", "{:.3f}", rouge_l)
