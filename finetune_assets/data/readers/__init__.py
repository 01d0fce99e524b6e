"""Reads the rows of a file one by one in bounded memory, in the formats of `READERS`.

A row that cannot be read is returned as `Unreadable`, and reading continues after it. If the rows after it cannot be
separated any more, the whole file is refused, so that no row is lost silently.
"""

import zlib
from collections.abc import Callable
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
    "ENDINGS",
    "KEPT_CHARACTERS",
    "MAX_ROW_BYTES",
    "READERS",
    "Records",
    "SourceFile",
    "SourceRecord",
    "Unreadable",
    "kept",
    "read_records",
    "suffix_of",
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
"""Readers by file extension, as in `suffix_of`."""
ENDINGS = f".jsonl, .json, .csv, .parquet, .ndjson, .tsv, .arrow (text also with {', '.join(COMPRESSED)})"
"""The file extensions that are supported, for messages."""


def suffix_of(path: PurePath | str) -> str:
    """File extension of a file of rows in lower case, with that of its compression; empty if it is not supported."""
    suffixes = [suffix.lower() for suffix in PurePath(path).suffixes[-2:]]
    return next((end for end in ("".join(suffixes), *suffixes[-1:]) if end in READERS), "")


def read_records(path: Path) -> Records:
    """Read all rows of a file; the file extension selects the format.

    Raises:
        DataError: naming file (and line), if the file as a whole cannot be read.
    """
    try:
        yield from READERS[suffix_of(path)](path)
    except (EOFError, zlib.error) as e:
        raise DataError(f"{path}: not a compressed file, or a truncated one: {e}; copy it again") from e
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
