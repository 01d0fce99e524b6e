"""The tokenizer of the index: words in lower case, without a model.

In scripts without spaces (Chinese, Japanese, Thai), each character is a word.
"""

import re
import unicodedata
from collections.abc import Iterator

from finetune_assets.data.folding import UNSPACED

_UNSPACED = "".join(f"{chr(low)}-{chr(high)}" for low, high in UNSPACED)
WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
STOPWORDS = {
    "english": frozenset(
        "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
        "this to was will with".split()
    ),
    "none": frozenset[str](),
}
"""Words that are not searched for, by the setting `index.stopwords`; those of Lucene's English analyzer."""


def words(text: str, without: frozenset[str] = frozenset()) -> list[str]:
    """Words of a text in lower case, with Unicode forms folded, without those of `without`."""
    plain = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    found = WORD.findall(plain)
    return [word for word in found if word not in without] if without else found


def count_words(text: str) -> int:
    """Number of words of a text, as `windows` counts them."""
    return sum(1 for _ in WORD.finditer(text))


def windows(text: str, size: int, overlap: int) -> Iterator[str]:
    """Cut a text into parts of `size` words; each begins with the last `overlap` words of the one before it.

    The parts keep the text's punctuation and spacing. A text of at most `size` words is one part.
    """
    ends = [match.span() for match in WORD.finditer(text)]
    if len(ends) <= size:
        yield text.strip()
        return
    for first in range(0, len(ends) - overlap, size - overlap):
        last = first + size
        begin = 0 if first == 0 else ends[first][0]
        end = len(text) if last >= len(ends) else ends[last][0]
        yield text[begin:end].strip()
