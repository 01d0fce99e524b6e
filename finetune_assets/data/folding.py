"""Text as a sequence of words and symbols, so that texts that differ only in case, spaces and quotes become equal.

A symbol that changes the meaning counts: `3 + 4` and `3 - 4` differ. Sentence punctuation and quotes do not count. In
scripts without spaces (Chinese, Japanese, Thai), each character is a word.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

UNKNOWN, IGNORED, LETTER, DIGIT, SYMBOL, OPERATOR, CHARACTER = range(7)
"""Classes of characters. Letters and digits form words; each of the last three is a word of its own."""
OPERATORS = frozenset("*/%^")
"""Operators in addition to Unicode's mathematical symbols."""
PUNCTUATION_THAT_COUNTS = frozenset("#%&*/@\\§†‡※‰‱")
"""Characters of Unicode's category of other punctuation that are symbols. The others end sentences, or are quotes."""
BRACKETS = frozenset("()[]{}⟨⟩⟦⟧⌈⌉⌊⌋")
"""Brackets that are symbols; the others are quotes."""
QUOTES = frozenset("`´¨")
UNSPACED = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF)),
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)
"""Code points of scripts that write no space between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""
DASHES = ((0x2010, 0x2015), (0x2212, 0x2212))
"""Code points of hyphens, dashes and the minus sign, which count as `-`."""
LONGEST_NUMBER = 20
"""Maximum number of digits of a number with a factorial."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix(seed: int, count: int) -> NDArray[np.uint64]:
    """Pseudo-random 64-bit numbers that are the same with every version of NumPy."""
    return mixed(np.arange(seed << 32, (seed << 32) + count, dtype=np.uint64) * GOLDEN)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of each number (the finalizer of SplitMix64), so that sums of them are good hashes."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_PLACES = splitmix(1, 256) | np.uint64(1)
"""Factor of each character of a word."""
_CLASSES = np.zeros(0x110000, np.uint8)
"""Class of each code point, filled as code points occur."""


class Words(NamedTuple):
    """Words of several texts.

    Attributes:
        hashes: Hash of each word, text after text; shape (words,).
        offsets: Index of each text's first word, and the number of words; shape (texts + 1,).
        is_number: Whether the word is a number, or a symbol that calculates; shape (words,).
    """

    hashes: NDArray[np.uint64]
    offsets: NDArray[np.int64]
    is_number: NDArray[np.bool_]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of words of each text; shape (texts,)."""
        return np.diff(self.offsets)

    @property
    def folded(self) -> NDArray[np.uint64]:
        """Hash of each text; equal for texts that are equal after folding. Shape (texts,)."""
        return sequence_hashes(self.hashes, self.offsets)

    def of(self, texts: NDArray[np.bool_]) -> "Words":
        """Words of some of the texts; `texts` is a mask of shape (texts,)."""
        kept, counts = np.repeat(texts, self.counts), self.counts[texts]
        return Words(self.hashes[kept], np.concatenate([[0], np.cumsum(counts)]), self.is_number[kept])


def words_of(texts: Sequence[str]) -> Words:
    """Split texts into words and hash them."""
    points, starts = _code_points(texts)
    classes, first = _classified(points)
    counted = np.flatnonzero(classes != IGNORED)
    begins = np.flatnonzero(first[counted])
    lengths = np.diff(begins, append=len(counted))
    places = np.arange(len(counted)) - np.repeat(begins, lengths)
    terms = (points[counted].astype(np.uint64) + np.uint64(1)) * _PLACES[places & 255]
    sums = np.add.reduceat(terms, begins) if len(begins) else np.empty(0, np.uint64)
    positions = counted[begins]
    kinds = classes[positions]
    return Words(mixed(sums), np.searchsorted(positions, starts), (kinds == DIGIT) | (kinds == OPERATOR))


def sequence_hashes(values: NDArray[np.uint64], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash of values[offsets[i] : offsets[i + 1]] in order, for each i, also of empty slices."""
    places = (np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets))).astype(np.uint64)
    return sums_of(mixed(values + places * GOLDEN), offsets)


def sums_of(values: NDArray[np.uint64], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Sum of values[offsets[i] : offsets[i + 1]] modulo 2^64, also of empty slices."""
    totals = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
    return totals[offsets[1:]] - totals[offsets[:-1]]


def folded(text: str) -> str:
    """The words of a text in lower case, with one space between them."""
    points, _ = _code_points([text])
    classes, first = _classified(points)
    counted = classes != IGNORED
    points, first = points[counted], first[counted]
    return np.insert(points, np.flatnonzero(first), ord(" ")).tobytes().decode("utf-32-le", "surrogatepass").strip()


def _code_points(texts: Iterable[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Code points of all texts, normalized, with a space after each, and where each begins (and the last ends)."""
    plain = [_normalized(text) for text in texts]
    starts = np.cumsum([0, *(len(text) + 1 for text in plain)])
    joined = " ".join([*plain, ""])
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    if not joined.isascii():
        points = points.copy()
        for low, high in DASHES:
            points[(points >= low) & (points <= high)] = ord("-")
    return points, starts


def _normalized(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _classified(points: NDArray[np.uint32]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Class of each character, and whether it is the first of a word."""
    classes = _CLASSES[points]
    if not classes.all():
        for point in np.unique(points[classes == UNKNOWN]).tolist():
            _CLASSES[point] = _class_of(chr(point))
        classes = _CLASSES[points]
    _count_punctuation(points, classes)
    in_word = (classes == LETTER) | (classes == DIGIT)
    first = classes >= SYMBOL
    first |= in_word
    first[1:] &= ~(in_word[1:] & in_word[:-1])
    return classes, first


_PUNCTUATION = np.array([0x21, 0x27, 0x2C, 0x2E, 0x3A], np.uint32)
"""Exclamation mark, apostrophe, comma, point and colon."""


def _count_punctuation(points: NDArray[np.uint32], classes: NDArray[np.uint8]) -> None:
    """Count punctuation of numbers and operators: `3.5`, `.5`, `1,000`, `12:30`, `5!`, `!=`, `:=`, `!x`, `f'(x)`."""
    at = np.flatnonzero(np.isin(points, _PUNCTUATION))
    if not len(at):
        return
    at = at[(at > 0) & (at < len(points) - 1)]
    mark, before, behind = points[at], classes[at - 1] == DIGIT, classes[at + 1] == DIGIT
    after_word = before | (classes[at - 1] == LETTER)
    in_number = behind & ((before & (mark != 0x21) & (mark != 0x27)) | (~after_word & (mark == 0x2E)))
    in_operator = (mark == 0x21) & ~after_word & (classes[at + 1] == LETTER)
    in_operator |= (mark == 0x27) & after_word & (points[at + 1] == 0x28)
    in_operator |= (points[at + 1] == 0x3D) & ((mark == 0x21) | (mark == 0x3A))
    factorial = (mark == 0x21) & before
    factorial[factorial] = _end_numbers(classes, at[factorial] - 1)
    classes[at[in_number | in_operator | factorial]] = OPERATOR


def _end_numbers(classes: NDArray[np.uint8], at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the word that ends with the digit at each index consists of at most `LONGEST_NUMBER` digits."""
    for _ in range(LONGEST_NUMBER):
        at = at - (classes[at] == DIGIT)
    return (classes[at] != LETTER) & (classes[at] != DIGIT)


def _class_of(char: str) -> int:
    category, point = unicodedata.category(char), ord(char)
    if category[0] in "LM" and any(low <= point <= high for low, high in UNSPACED):
        return CHARACTER
    if category[0] == "N":
        return DIGIT
    if 0xFE00 <= point <= 0xFE0F or char in QUOTES:  # variation selectors choose a picture, not a meaning
        return IGNORED
    if category[0] in "LM" or category == "Pc":
        return LETTER
    if category == "Sm" or char in OPERATORS:
        return OPERATOR
    if category[0] == "S" or category == "Pd" or char in PUNCTUATION_THAT_COUNTS or char in BRACKETS:
        return SYMBOL
    return IGNORED
