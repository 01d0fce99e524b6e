"""Reads the rows of a file one by one in bounded memory, in the formats of `READERS`.

A row that cannot be read is returned as `Unreadable`, and reading continues after it. If the rows after it cannot be
separated any more, the whole file is refused, so that no row is lost silently.
"""

import zlib
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers.columnar import read_arrow, read_parquet
from finetune_assets.data.readers.delimited import read_delimited
from finetune_assets.data.readers.json_rows import read_json
from finetune_assets.data.readers.opening import COMPRESSED
from finetune_assets.data.readers.records import (
    KEPT_CHARACTERS,
    MAX_ROW_BYTES,
    Records,
    SourceFile,
    SourceRecord,
    Unreadable,
    kept,
)

__all__ = [
    "DOCUMENT_FORMATS",
    "KEPT_CHARACTERS",
    "MARKDOWN_ENDINGS",
    "MAX_ROW_BYTES",
    "READERS",
    "ROW_FORMATS",
    "TEXT_ENDINGS",
    "Formats",
    "Records",
    "SourceFile",
    "SourceRecord",
    "Unreadable",
    "kept",
    "read_records",
]

TEXT_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": partial(read_delimited, delimiter=","),
    ".ndjson": read_json,
    ".tsv": partial(read_delimited, delimiter="\t"),
}
"""Readers of text, which may be compressed, by file extension."""
READERS: dict[str, Callable[[Path], Records]] = {
    **TEXT_READERS,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    **{text + compressed: reader for text, reader in TEXT_READERS.items() for compressed in COMPRESSED},
}
"""Readers by file extension, as in `Formats.suffix_of`."""
MARKDOWN_ENDINGS = frozenset(end + packed for end in (".md", ".markdown") for packed in ("", *COMPRESSED))
TEXT_ENDINGS = MARKDOWN_ENDINGS | {".txt", *(f".txt{packed}" for packed in COMPRESSED)}
"""File extensions of documents that are one text."""


@dataclass(frozen=True)
class Formats:
    """File formats that a source may have.

    Attributes:
        endings: Their file extensions.
        shown: The same for messages.
    """

    endings: Set[str]
    shown: str

    def suffix_of(self, path: PurePath | str) -> str:
        """File extension of a file in lower case, with that of its compression; empty if it is not supported."""
        suffixes = [suffix.lower() for suffix in PurePath(path).suffixes[-2:]]
        return next((end for end in ("".join(suffixes), *suffixes[-1:]) if end in self.endings), "")


_ROWS = ".jsonl, .json, .csv, .parquet, .ndjson, .tsv, .arrow"
_PACKED = f"(text also with {', '.join(COMPRESSED)})"
ROW_FORMATS = Formats(frozenset(READERS), f"{_ROWS} {_PACKED}")
DOCUMENT_FORMATS = Formats(ROW_FORMATS.endings | TEXT_ENDINGS, f".txt, .md, {_ROWS} {_PACKED}")


def read_records(path: Path) -> Records:
    """Read all rows of a file; the file extension selects the format.

    Raises:
        DataError: naming file (and line), if the file as a whole cannot be read.
    """
    try:
        yield from READERS[ROW_FORMATS.suffix_of(path)](path)
    except (EOFError, zlib.error) as e:
        raise DataError(f"{path}: not a compressed file, or a truncated one: {e}; copy it again") from e
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
