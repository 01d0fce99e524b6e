"""BM25 by bm25s: sparse columns of scores, one for each word, memory-mapped.

Titles are searched with the texts. Results depend on passages and query alone: passages of equal score are in the
order of their numbers.
"""

import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_assets.config.documents_schema import IndexSettings
from finetune_assets.progress import Progress, Unit
from finetune_assets.retrieval.index import Hit
from finetune_assets.retrieval.passages import Passages
from finetune_assets.retrieval.words import STOPWORDS, words

PASSAGES = Unit("passages")
VOCABULARY = "vocab.index.json"
READ_PASSAGES = 1_000
"""Passages that are read at a time."""
QUERY_WORDS = 1_000
"""Maximum number of words of a query; the rest is not searched for."""


def build(passages: Passages, settings: IndexSettings, folder: Path, models: Path | None) -> Mapping[str, Any]:
    """Write the index of passages to a folder; see `IndexKind`."""
    from bm25s import BM25

    numbers, texts = _numbered(passages, settings)
    bm25 = BM25(k1=settings.k1, b=settings.b, backend="numpy", csc_backend="numpy")
    bm25.index((texts, numbers), create_empty_token=False, show_progress=False)
    bm25.save(folder, show_progress=False)
    vocabulary = json.dumps(numbers, ensure_ascii=False)  # bm25s writes other bytes where orjson is installed
    (folder / VOCABULARY).write_text(vocabulary, encoding="utf-8")
    return {"words": len(numbers)}


def _numbered(passages: Passages, settings: IndexSettings) -> tuple[dict[str, int], list["array[int]"]]:
    """Numbers of all words, by first occurrence, and the words of each passage as numbers."""
    numbers: dict[str, int] = {}
    texts: list[array[int]] = []
    without = STOPWORDS[settings.stopwords]
    with Progress("indexing passages", len(passages), PASSAGES) as progress:
        for start in range(0, len(passages), READ_PASSAGES):
            part = slice(start, start + READ_PASSAGES)
            for title, text in zip(passages.titles[part], passages.texts[part], strict=True):
                found = words(f"{title}\n{text}" if title else text, without)
                texts.append(array("i", (numbers.setdefault(word, len(numbers)) for word in found)))
            progress.reach(len(texts))
    if not numbers:
        numbers, texts = {"": 0}, [array("i", [0])] * len(texts)  # no passage has a word; none is found
    return numbers, texts


def open_index(passages: Passages, settings: IndexSettings, folder: Path) -> "Bm25Searcher":
    """Open the index that `build` wrote; see `IndexKind`."""
    return Bm25Searcher(settings, folder)


class Bm25Searcher:
    """Finds passages by BM25."""

    def __init__(self, settings: IndexSettings, folder: Path) -> None:
        from bm25s import BM25

        self._bm25 = BM25.load(folder, mmap=True, show_progress=False)
        self._without = STOPWORDS[settings.stopwords]

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[Hit]:
        numbers = self._bm25.get_tokens_ids(words(query, self._without)[:QUERY_WORDS])
        if not numbers or k < 1:
            return []
        scores = self._bm25.get_scores_from_ids(numbers)
        return [Hit(int(passage), float(scores[passage])) for passage in best(scores, k)]


def best(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Numbers of the `k` highest scores above 0, highest first, equal scores by number."""
    found = np.flatnonzero(scores >= max(np.partition(scores, -k)[-k], np.finfo(np.float32).tiny))
    return found[np.lexsort((found, -scores[found]))][:k]
