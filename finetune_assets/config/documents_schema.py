"""Every setting of a document set, `configs/documents/NAME.yaml`: schema, defaults and documentation."""

from dataclasses import dataclass, field
from typing import Literal

from finetune_assets.config.fields import NOT_IDENTITY, not_identity
from finetune_assets.config.raw_data_schema import HubDataset

INDEX_KINDS = {
    "bm25": "finetune_assets.retrieval.bm25",
    "dense": "finetune_assets.retrieval.dense",
}
"""Module of each kind of index: it has the functions `build` and `open_index` (docs/extending.md)."""


@dataclass
class DocumentColumns:
    """Columns of documents in JSON Lines, JSON, CSV, Parquet and Arrow files; text and Markdown files have none."""

    text: str | None = None
    """Text of the document; `null` uses `text`, `content`, `body`, `passage` or `context`."""
    title: str | None = None
    """Title of the document; `null` uses `title`. It is searched with the text."""
    id: str | None = None
    """Identifier of the document, shown as its source after the file's name; `null` uses `id`, and the number of the
    line or row where there is none."""


@dataclass
class PassageSettings:
    """How a document is split into passages."""

    by: Literal["paragraph", "tokens", "document"] = "paragraph"
    """`paragraph`: each paragraph is a passage; paragraphs are separated by blank lines, and a longer one than `size`
    is split as by `tokens`. `tokens`: passages of `size` words of the index's tokenizer. `document`: each document is a
    passage. A heading of a Markdown document is the title of the passages below it."""
    size: int = 256
    """Maximum length of a passage, in words of the index's tokenizer (not tokens of a model), except by `document`."""
    overlap: int = 32
    """Words that a passage has in common with the one before it, where a text is split by words."""


@dataclass
class IndexSettings:
    """How passages are found."""

    kind: str = "bm25"
    """`bm25` (words in common, weighted by how rare they are) or `dense` (similarity of embeddings)."""
    k1: float = 1.5
    """BM25: how much a repeated word counts."""
    b: float = 0.75
    """BM25: how much the length of a passage counts, from 0 to 1."""
    stopwords: Literal["english", "none"] = "english"
    """BM25: leave out the most frequent English words; use `none` for documents in other languages."""
    model: str | None = None
    """Dense: folder of a sentence-transformers model or of a language model, or the name of a sentence-transformers
    model on the Hub with its commit, `owner/name@commit`; required by the kind `dense`."""


@dataclass
class DocumentChecks:
    """Thresholds of the checks of `retrieval_index`, as fractions from 0 to 1."""

    k: int = 3
    """Number of passages among which the golden passage counts as found by the check `hit`."""
    min_hit: float = 0.5
    """Minimum fraction of the raw data's rows with a known golden passage that is among the first `k` passages for
    their question; below it, the blocking check `hit` fails."""
    rows: int = 2000
    """Maximum number of rows that the check `hit` searches for, chosen by content."""
    max_near_duplicate_share: float = 0.05
    """Passages that are near-duplicates of an earlier one; above it, the check `near_duplicates` warns."""
    long_words: int = 512
    """Length from which a passage is long, in words of the index's tokenizer."""
    max_long_share: float = 0.05
    """Long passages; above it, the check `long_passages` warns."""
    max_empty_share: float = 0.1
    """Documents without text; above it, the blocking check `empty` fails, as it does if there is no passage at all."""


@dataclass
class DocumentsConfig:
    """A set of documents that experiments retrieve passages from (`data.retrieval.documents`)."""

    description: str = not_identity("")
    """What the documents are."""
    source: str | None = not_identity(None)
    """`sample` (the packaged documents); a file or a folder of text (`.txt`), Markdown (`.md`), `.jsonl`, `.json`,
    `.csv`, `.parquet` and `.arrow` files (text also compressed), also `s3://bucket/folder`; or
    `hf://datasets/owner/name@revision` (branch, tag or commit; default `main`). Its content is part of the fingerprint,
    not its place."""
    from_contexts: bool = False
    """Use the distinct contexts of the raw data as documents, in place of `source`."""
    hub: HubDataset = field(default_factory=HubDataset, metadata=NOT_IDENTITY)
    """Part of a Hub dataset to read."""
    columns: DocumentColumns = field(default_factory=DocumentColumns)
    """Columns of the source."""
    passages: PassageSettings = field(default_factory=PassageSettings)
    """How documents are split."""
    index: IndexSettings = field(default_factory=IndexSettings)
    """How passages are found."""
    checks: DocumentChecks = field(default_factory=DocumentChecks, metadata=NOT_IDENTITY)
    """Thresholds of the checks."""
    quiet_seconds: float = not_identity(4.0)
    """Debounce time of `documents_sensor`, in seconds: the source is read when it has not changed for this long."""
