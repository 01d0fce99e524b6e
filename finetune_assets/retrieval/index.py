"""The index of a document set: builds it, opens it, and finds passages.

An artifact has `passages.arrow`, the folder `index/` with the files of its kind of index, and `index.json`: settings,
counts, and the fingerprint of the passages.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from finetune_assets.config.documents_schema import INDEX_KINDS, DocumentsConfig, IndexSettings, PassageSettings
from finetune_assets.data.errors import DataError
from finetune_assets.retrieval.documents import Document
from finetune_assets.retrieval.near_duplicates import near_duplicate_passages
from finetune_assets.retrieval.passages import PASSAGES_FILE, Passages, PassageStatistics, write_passages
from finetune_assets.store.hashing import sha256
from finetune_assets.store.json_object import read_json

INDEX_FILE, INDEX_FOLDER = "index.json", "index"
SHOWN = 5
"""Number of passages in the preview."""


class Hit(NamedTuple):
    """A passage that was found.

    Attributes:
        passage: Its number.
        score: Its score; higher is better, and scores of different queries cannot be compared.
    """

    passage: int
    score: float


class Searcher(Protocol):
    """What a kind of index is: finds the numbers of passages."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Find the best `k` passages of each query, best first, those of equal score by number.

        A query has fewer hits if fewer passages have anything in common with it.
        """


class IndexKind(Protocol):
    """Module of a kind of index, registered in `INDEX_KINDS`."""

    def build(
        self, passages: Passages, settings: IndexSettings, folder: Path, models: Path | None
    ) -> Mapping[str, Any]:
        """Write the index's files to a folder: the same bytes for the same passages and settings.

        The files must have all that a search needs, such as a copy of a model.

        Args:
            passages: The passages.
            settings: How passages are found.
            folder: An empty folder.
            models: Folder that relative paths of models start from.

        Returns:
            What `index.json` has to hold beside the settings.
        """

    def open_index(self, passages: Passages, settings: IndexSettings, folder: Path) -> Searcher:
        """Open the index that `build` wrote, also on a machine that has nothing but the folder."""


class Index:
    """The passages of a document set, and the index that finds them. Open one with `open_index`.

    Args:
        folder: Folder of the artifact.

    Attributes:
        passages: The passages.
        kind: Kind of the index.
        fingerprint: Fingerprint of passages and index, the same for the same files.
        statistics: Counts of the document set.
    """

    def __init__(self, folder: Path) -> None:
        described = read_description(folder)
        self.kind: str = described["index"]["kind"]
        self.fingerprint: str = described["fingerprint"]
        self.statistics: dict[str, Any] = described["statistics"]
        self.passages = Passages(folder, PassageSettings(**described["passages"]))
        settings = IndexSettings(**described["index"])
        self._searcher = kind_of(settings).open_index(self.passages, settings, folder / INDEX_FOLDER)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Find the best `k` passages of each query, best first, those of equal score by number.

        A query has fewer hits if fewer passages have anything in common with it.
        """
        return self._searcher.search(queries, min(k, len(self.passages)))


def read_description(folder: Path) -> dict[str, Any]:
    """`index.json` of an artifact's folder: settings, counts, near-duplicates and the first passages."""
    return read_json(folder / INDEX_FILE, f"the retrieval index in {folder}")


def open_index(folder: Path) -> Index:
    """Open the index of an artifact's folder; its files are memory-mapped."""
    return Index(folder)


def kind_of(settings: IndexSettings) -> IndexKind:
    """The kind of index that settings name."""
    kind: Any = import_module(INDEX_KINDS[settings.kind])
    return kind  # type: ignore[no-any-return]


def build_index(
    documents: Iterable[Document], config: DocumentsConfig, folder: Path, models: Path | None = None
) -> PassageStatistics:
    """Write passages, index and `index.json` of a document set to a folder.

    Raises:
        DataError: if a document cannot be read, or no document has text.
    """
    statistics = write_passages(documents, config.passages, folder)
    if not statistics.passages:
        raise DataError(
            f"no passage: {statistics.documents:,} documents, none with text; add documents, or see columns.text"
        )
    passages = Passages(folder, config.passages)
    (folder / INDEX_FOLDER).mkdir()
    extra = kind_of(config.index).build(passages, config.index, folder / INDEX_FOLDER, models)
    described = {
        "index": asdict(config.index),
        "passages": asdict(config.passages),
        "statistics": statistics.to_dict(),
        "near_duplicates": near_duplicate_passages(passages),
        "preview": [
            {"title": passages.titles[number], "text": passages.texts[number], "source": passages.sources[number]}
            for number in range(min(SHOWN, len(passages)))
        ],
        "fingerprint": sha256(folder / PASSAGES_FILE),
        **extra,
    }
    (folder / INDEX_FILE).write_text(json.dumps(described, indent=1), encoding="utf-8")
    return statistics
