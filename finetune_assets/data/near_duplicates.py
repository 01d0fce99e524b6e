"""Near-duplicates of texts, found by MinHash signatures and locality-sensitive hashing.

The similarity of two texts is the Jaccard index of their sets of `SHINGLE` words in a row, with blanks before the first
and behind the last word, estimated by `PERMUTATIONS` minima (Broder 1997) of which 8 bits each are kept (Li and König
2010). Two rules keep short texts apart that differ in the word that matters: see `Signatures`.

A signature is cut into `BANDS` bands of four minima. Texts that agree in one band are compared. Two texts that agree in
80% of the minima agree in at least seven bands, so none is missed, unless a band has more than `NEIGHBOURS` texts
(texts from one template): then a text is compared with the nearest in the order of their signatures.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_assets.data.folding import Words, mixed, sequence_hashes, splitmix, sums_of

SHINGLE: Final = 3
PERMUTATIONS: Final = 128
BAND: Final = 4
BANDS: Final = PERMUTATIONS // BAND
NEIGHBOURS: Final = 32
"""Maximum number of texts on either side that a text is compared with in each band."""
LEAST_WORDS: Final = 32
"""Shorter texts are near-duplicates only if they are equal after folding."""
LEAST_WORDS_FOR_NUMBERS: Final = 100
"""In shorter texts, numbers and operators must be the same."""
THRESHOLD: Final = 0.8
_BLOCK, _PERMUTED = 8_192, 8
"""Shingles and permutations hashed at a time; their product fits in a processor's cache."""
_PAIRS = 65_536
"""Pairs compared at a time."""
_CHANCE = 1 / 256
"""Probability that 8 bits of two different minima agree."""
_FACTORS = (splitmix(2, PERMUTATIONS) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
_SHINGLE_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_BLANK = np.uint64(0x5851F42D4C957F2D)


class Signatures(NamedTuple):
    """Signatures of several texts, 148 bytes each.

    Two texts are near-duplicates if they are equal after folding, or if the estimated similarity of their minima
    reaches a threshold and both of these hold: the shorter has at least `LEAST_WORDS` words; and it has at least
    `LEAST_WORDS_FOR_NUMBERS`, or both have the same numbers and operators.

    Attributes:
        minima: Eight bits of each minimum; shape (texts, `PERMUTATIONS`).
        folded: Hash of the words in order; shape (texts,).
        numbers: Hash of the numbers and operators in any order; shape (texts,).
        words: Number of words; shape (texts,).
    """

    minima: NDArray[np.uint8]
    folded: NDArray[np.uint64]
    numbers: NDArray[np.uint64]
    words: NDArray[np.uint32]

    def take(self, texts: NDArray[np.int64]) -> "Signatures":
        return Signatures(self.minima[texts], self.folded[texts], self.numbers[texts], self.words[texts])


class GrowingSignatures:
    """Signatures of texts that arrive in batches, in memory that grows in place."""

    def __init__(self) -> None:
        self._columns = tuple(bytearray() for _ in Signatures._fields)

    def append(self, batch: Signatures) -> None:
        values = [part.tobytes() for part in (batch.minima, batch.folded, batch.numbers, batch.words)]
        for column, more in zip(self._columns, values, strict=True):
            column += more

    def all(self) -> Signatures:
        """All signatures, as views of the memory."""
        minima, folded, numbers, words = self._columns
        return Signatures(
            np.frombuffer(minima, np.uint8).reshape(-1, PERMUTATIONS),
            np.frombuffer(folded, np.uint64),
            np.frombuffer(numbers, np.uint64),
            np.frombuffer(words, np.uint32),
        )


def sign(words: Words, offsets: NDArray[np.int64]) -> Signatures:
    """Signatures of texts that consist of several parts.

    Args:
        words: Words of the parts.
        offsets: Index of each text's first part, and the number of parts; shape (texts + 1,).
    """
    whole = Words(words.hashes, words.offsets[offsets], words.is_number)
    numbers = sums_of(mixed(words.hashes) * words.is_number, whole.offsets)
    folded = sequence_hashes(words.folded, offsets)
    return Signatures(_minima(whole), folded, numbers, whole.counts.astype(np.uint32))


def shingle_hashes(words: Words, size: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hash of each `size` words in a row, with `size` - 1 blanks before the first and behind the last word.

    Returns:
        The hashes, text after text, and the index of each text's first.
    """
    texts = len(words.offsets) - 1
    blanks = size - 1
    starts = words.offsets[:-1] + blanks * np.arange(texts)
    padded = np.full(len(words.hashes) + blanks * (texts + 1), _BLANK)
    padded[np.arange(len(words.hashes)) + np.repeat(blanks * np.arange(1, texts + 1), words.counts)] = words.hashes
    count = len(padded) - blanks
    hashes = padded[:count].copy()
    for shift in range(1, size):
        hashes *= _SHINGLE_FACTOR
        hashes += padded[shift : shift + count]
    return mixed(hashes), starts


def word_sequences(words: Words, size: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hash of each `size` words in a row of each text, without blanks, and the text that it is in."""
    hashes, starts = shingle_hashes(words, size)
    counts = np.maximum(words.counts - size + 1, 0)
    texts = np.repeat(np.arange(len(counts)), counts)
    firsts = starts + size - 1  # shingles before begin with a blank
    return hashes[np.arange(int(counts.sum())) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)], texts


def _minima(words: Words) -> NDArray[np.uint8]:
    hashes, starts = shingle_hashes(words, SHINGLE)
    values = (hashes >> np.uint64(32)).astype(np.uint32)
    lowest = np.full((PERMUTATIONS, len(starts)), 0xFFFFFFFF, np.uint32)
    permuted = np.empty((_PERMUTED, _BLOCK), np.uint32)
    for begin in range(0, len(values), _BLOCK):
        block = values[begin : begin + _BLOCK]
        first = int(np.searchsorted(starts, begin, "right")) - 1
        last = int(np.searchsorted(starts, begin + len(block), "left"))
        cuts = np.maximum(starts[first:last] - begin, 0)
        for some in range(0, PERMUTATIONS, _PERMUTED):
            here = permuted[:, : len(block)]
            np.multiply(_FACTORS[some : some + _PERMUTED, None], block, out=here)
            minima = lowest[some : some + _PERMUTED, first:last]
            np.minimum(minima, np.minimum.reduceat(here, cuts, axis=1), out=minima)
    lowest *= np.uint32(0x9E3779B1)
    return np.ascontiguousarray((lowest >> np.uint32(24)).astype(np.uint8).T)


def near_duplicates(
    ours: Signatures, our: NDArray[np.int64], others: Signatures, other: NDArray[np.int64], threshold: float
) -> NDArray[np.bool_]:
    """Whether texts our[i] and other[i] are near-duplicates, for each i; shape (pairs,)."""
    agreeing = np.empty(len(our), np.int64)
    for begin in range(0, len(our), _PAIRS):
        part = slice(begin, begin + _PAIRS)
        agreeing[part] = np.count_nonzero(ours.minima[our[part]] == others.minima[other[part]], axis=1)
    similarity = (agreeing / PERMUTATIONS - _CHANCE) / (1 - _CHANCE)
    shorter = np.minimum(ours.words[our], others.words[other])
    same_numbers = (shorter >= LEAST_WORDS_FOR_NUMBERS) | (ours.numbers[our] == others.numbers[other])
    similar = (similarity >= threshold) & (shorter >= LEAST_WORDS) & same_numbers
    return similar | (ours.folded[our] == others.folded[other])


def earlier_near_duplicates(texts: Signatures, threshold: float) -> NDArray[np.int64]:
    """For each text, the number of an earlier near-duplicate, or -1; shape (texts,)."""
    _, first, group = np.unique(texts.folded, return_index=True, return_inverse=True)
    earlier = first[group]
    earlier[earlier == np.arange(len(earlier))] = -1
    for band in range(BANDS):
        left = np.flatnonzero((earlier < 0) & (texts.words >= LEAST_WORDS))
        keys = _keys(texts.minima, band, left)
        order = np.argsort(keys, kind="stable")
        buckets, rows = keys[order] >> np.uint64(32), left[order]
        at = np.arange(len(rows))
        for distance in range(1, NEIGHBOURS + 1):
            at = at[at >= distance]
            at = at[buckets[at] == buckets[at - distance]]
            if not len(at):
                break
            one, other = rows[at], rows[at - distance]
            alike = near_duplicates(texts, one, texts, other, threshold)
            earlier[np.maximum(one, other)[alike]] = np.minimum(one, other)[alike]
    return earlier


class Index:
    """Finds the near-duplicates of texts among given ones.

    Args:
        texts: The texts to find; their order has no effect on what is found.
        threshold: Minimum estimated similarity of near-duplicates.

    Attributes:
        group: Number of each given text's group; texts of a group are equal after folding. Shape (given texts,).
    """

    def __init__(self, texts: Signatures, threshold: float) -> None:
        self.threshold = threshold
        self._folded, firsts, self.group = np.unique(texts.folded, return_index=True, return_inverse=True)
        self._texts = texts.take(firsts)
        long = np.flatnonzero(self._texts.words >= LEAST_WORDS)
        long = long[np.lexsort(self._texts.minima[long].view(np.uint64).T)] if len(long) else long
        self._bands = [self._band(band, long) for band in range(BANDS)]

    def _band(self, band: int, texts: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
        keys = _keys(self._texts.minima, band, texts)
        order = np.argsort(keys, kind="stable")
        return keys[order], texts[order].astype(np.int32)

    def find(self, texts: Signatures) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs of a text and a group of given texts that are near-duplicates; each pair once, in order."""
        at = np.searchsorted(self._folded, texts.folded)
        equal = np.flatnonzero(np.append(self._folded, 0)[at] == texts.folded) if len(self._folded) else at[:0]
        pairs = [(equal, at[equal]), *(pair for band in range(BANDS) for pair in self._in_band(texts, band))]
        found = np.unique(np.concatenate([np.stack(pair, axis=1) for pair in pairs]), axis=0)
        return found[:, 0], found[:, 1]

    def _in_band(self, texts: Signatures, band: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        ours, numbers = self._bands[band]
        if not len(ours):
            return
        keys = _keys(texts.minima, band)
        heads = keys & np.uint64(0xFFFFFFFF00000000)
        low = np.searchsorted(ours, heads)
        hit = np.flatnonzero(
            (ours[np.minimum(low, len(ours) - 1)] & np.uint64(0xFFFFFFFF00000000) == heads)
            & (low < len(ours))
            & (texts.words >= LEAST_WORDS)
        )
        high = np.searchsorted(ours, heads[hit] | np.uint64(0xFFFFFFFF), "right")
        middle = np.searchsorted(ours, keys[hit])
        one, at = _ranges(hit, np.maximum(low[hit], middle - NEIGHBOURS), np.minimum(high, middle + NEIGHBOURS))
        for begin in range(0, len(one), _PAIRS):
            part = one[begin : begin + _PAIRS]
            other = numbers[at[begin : begin + _PAIRS]].astype(np.int64)
            alike = near_duplicates(texts, part, self._texts, other, self.threshold)
            yield part[alike], other[alike]


def _ranges(
    texts: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each text with each number of its range: texts[i] with low[i], ..., high[i] - 1."""
    lengths = high - low
    firsts = np.repeat(low - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) if len(low) else low
    return np.repeat(texts, lengths), firsts + np.arange(int(lengths.sum()))


def _keys(minima: NDArray[np.uint8], band: int, texts: NDArray[np.int64] | None = None) -> NDArray[np.uint64]:
    """The eight minima that begin with a band, as numbers in the order of the minima; shape (texts,)."""
    columns = np.arange(band * BAND, band * BAND + 2 * BAND) % PERMUTATIONS
    chosen = minima[:, columns] if texts is None else minima[texts[:, None], columns]
    return np.ascontiguousarray(chosen).view(">u8")[:, 0].astype(np.uint64)
