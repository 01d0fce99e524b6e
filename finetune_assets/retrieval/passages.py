"""Passages: parts of documents, each of which is retrieved as a whole.

Passages are deduplicated by content: of several that differ in nothing but case, spacing and Unicode form, the first
is kept. The id of a passage depends on its content alone.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune_assets.config.documents_schema import PassageSettings
from finetune_assets.data.errors import DataError
from finetune_assets.data.rows import plain
from finetune_assets.progress import Progress, Unit
from finetune_assets.retrieval.documents import PART_CHARACTERS, Document
from finetune_assets.retrieval.splitting import last_title, split_document, split_text
from finetune_assets.retrieval.words import count_words

PASSAGES_FILE = "passages.arrow"
PASSAGES = pa.schema(
    [
        pa.field(
            "id",
            pa.string(),
            nullable=False,
            metadata={"doc": "16 hex digits of the sha256 of the text with case, spacing and Unicode form folded"},
        ),
        pa.field("text", pa.string(), nullable=False, metadata={"doc": "the passage; never blank"}),
        pa.field(
            "source",
            pa.string(),
            nullable=False,
            metadata={"doc": "file of the document relative to the source, and #id or #line of one of several in it"},
        ),
        pa.field(
            "position", pa.int32(), nullable=False, metadata={"doc": "number of the passage in its document, from 0"}
        ),
        pa.field(
            "title",
            pa.string(),
            nullable=False,
            metadata={"doc": "title of the document or heading above the passage; may be empty"},
        ),
        pa.field("words", pa.int32(), nullable=False, metadata={"doc": "words of the text, as the index counts them"}),
    ]
)
"""Columns of `passages.arrow`, an Arrow file that is memory-mapped."""
BATCH_ROWS, BATCH_CHARACTERS = 1_000, 8 << 20
"""Maximum size of a batch of the file, in passages and in characters, after which it is written."""
SHOWN = 10
"""Maximum number of documents that the statistics name."""
DOCUMENTS = Unit("documents")


@dataclass
class PassageStatistics:
    """Counts of a document set.

    Attributes:
        documents: Number of documents.
        passages: Number of passages.
        words: Number of words of all passages.
        empty_documents: Documents without text.
        first_empty: The first of them.
        duplicate_documents: Documents all of whose passages occur in earlier documents.
        first_duplicates: The first of them.
        duplicate_passages: Passages left out because an earlier one has the same content.
    """

    documents: int = 0
    passages: int = 0
    words: int = 0
    empty_documents: int = 0
    first_empty: list[str] = field(default_factory=list)
    duplicate_documents: int = 0
    first_duplicates: list[str] = field(default_factory=list)
    duplicate_passages: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def passage_id(text: str) -> str:
    """Id of a passage: equal for texts that differ in nothing but case, spacing and Unicode form."""
    return hashlib.sha256(plain(text).encode()).hexdigest()[:16]


class PassageWriter:
    """Splits documents and writes their passages, each content once.

    Args:
        writer: Writer of an Arrow file of `PASSAGES`.
        settings: How documents are split.

    Attributes:
        statistics: Counts of what was written.
    """

    def __init__(self, writer: pa.RecordBatchFileWriter, settings: PassageSettings) -> None:
        self.writer, self.settings, self.statistics = writer, settings, PassageStatistics()
        self._known, self._rows, self._characters = set[int](), list[dict[str, Any]](), 0
        self._title, self._position, self._new = "", 0, 0

    def add(self, document: Document) -> None:
        """Write the passages of a document, or of a part of it.

        Raises:
            DataError: if the document is to be one passage, and is too long.
        """
        if document.part == 0:
            self._title, self._position, self._new = "", 0, 0
        if self.settings.by == "document" and (document.has_more or len(document.text) > PART_CHARACTERS):
            raise DataError(
                f"{document.source}: a document of more than {PART_CHARACTERS:,} characters cannot be one passage; "
                "use passages.by: paragraph or tokens"
            )
        for text, title in split_document(document, self.settings, self._title):
            self._passage(text, title, document.source)
        if document.has_more:
            self._title = last_title(document, self._title)
        else:
            self._count(document.source)

    def _passage(self, text: str, title: str, source: str) -> None:
        identifier = passage_id(text)
        position, self._position = self._position, self._position + 1
        if (number := int(identifier, 16)) in self._known:
            self.statistics.duplicate_passages += 1
            return
        self._known.add(number)
        self._new += 1
        self.statistics.passages += 1
        words = count_words(text)
        self.statistics.words += words
        self._rows.append(dict(zip(PASSAGES.names, (identifier, text, source, position, title, words), strict=True)))
        self._characters += len(text)
        if len(self._rows) >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS:
            self.write()

    def _count(self, source: str) -> None:
        """Count a document whose last part was added."""
        statistics = self.statistics
        statistics.documents += 1
        if not self._position:
            statistics.empty_documents += 1
            statistics.first_empty += [source][: SHOWN - len(statistics.first_empty)]
        elif not self._new:
            statistics.duplicate_documents += 1
            statistics.first_duplicates += [source][: SHOWN - len(statistics.first_duplicates)]

    def write(self) -> None:
        """Write the passages that were not written yet."""
        if self._rows:
            self.writer.write_batch(pa.RecordBatch.from_pylist(self._rows, PASSAGES))
        self._rows, self._characters = [], 0


def write_passages(documents: Iterable[Document], settings: PassageSettings, folder: Path) -> PassageStatistics:
    """Split documents and write their passages, each content once, to `passages.arrow` in a folder.

    Raises:
        DataError: if a document cannot be read, or is to be one passage and is too long.
    """
    with (
        pa.ipc.new_file(str(folder / PASSAGES_FILE), PASSAGES) as file,
        Progress("reading documents", None, DOCUMENTS) as progress,
    ):
        writer = PassageWriter(file, settings)
        for document in documents:
            writer.add(document)
            progress.add(not document.has_more)
        writer.write()
    return writer.statistics


class Column(Sequence[str]):
    """A memory-mapped text column, by number of the passage."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, number: Any) -> Any:
        part = self._column[number]
        return part.to_pylist() if isinstance(number, slice) else part.as_py()


class Passages:
    """The passages of an artifact, memory-mapped.

    Args:
        folder: Folder of the artifact.
        settings: How its documents were split.

    Attributes:
        ids: Id of each passage.
        texts: Text of each passage.
        sources: Document of each passage.
        titles: Title of each passage.
        words: Number of words of each passage.
    """

    def __init__(self, folder: Path, settings: PassageSettings) -> None:
        self.settings = settings
        self.table = pa.ipc.open_file(pa.memory_map(str(folder / PASSAGES_FILE))).read_all()
        self.ids, self.texts, self.sources, self.titles = (
            Column(self.table[name]) for name in ("id", "text", "source", "title")
        )

        self.words: NDArray[np.int32] = self.table["words"].to_numpy()

    def __len__(self) -> int:
        return len(self.ids)

    def number_of(self, text: str) -> int | None:
        """Number of the passage with this content, or None."""
        return self.number_of_id(passage_id(text))

    def number_of_id(self, identifier: str) -> int | None:
        """Number of the passage with this id, or None."""
        ids, numbers = self._by_id
        wanted = np.uint64(int(identifier, 16))
        at = int(np.searchsorted(ids, wanted))
        return int(numbers[at]) if at < len(ids) and ids[at] == wanted else None

    def parts_of(self, text: str) -> list[str]:
        """The passages that a text would be split into."""
        return split_text(text, self.settings)

    @cached_property
    def _by_id(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Ids in ascending order, each with its passage's number."""
        ids = np.fromiter((int(value.as_py(), 16) for value in self.table["id"]), np.uint64, len(self))
        order = np.argsort(ids, kind="stable")
        return ids[order], order
