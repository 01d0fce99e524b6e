"""How answers are judged."""

import re
from collections import defaultdict


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are the same but for case, white space and a final full stop."""
    return _folded(answer) == _folded(expected)


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L (Lin 2004): the F-measure of the longest common subsequence of words, from 0 to 1.

    As the rouge_score package computes it, but with the words of any script: that one's own know ASCII alone, and give
    all others 0.
    """
    ours, theirs = _words(answer), _words(expected)
    common = longest_common_subsequence(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Its length, by Hyyrö's bit-parallel algorithm (2004): one word of `second` at a time, all of `first` at once."""
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(first):
        places[word] |= 1 << place
    every = unmatched = (1 << len(first)) - 1
    for word in second:
        met = unmatched & places[word]
        unmatched = ((unmatched + met) | (unmatched - met)) & every
    return len(first) - unmatched.bit_count()


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
