"""Raw data from local files, and from the packaged sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers import READERS, SourceFile, read_records
from finetune_assets.sources.source import ENDINGS, SourceContext
from finetune_assets.store.hashing import sha256

SAMPLE = Path(__file__).parent.parent / "sample" / "dolly_sample.jsonl"


@dataclass(frozen=True)
class LocalSource:
    """Local files."""

    local_files: Sequence[SourceFile]
    is_pinned = False

    def content(self) -> Any:
        return [[file.path.suffix.lower(), _content_of(file.path)] for file in self.local_files]

    def peek(self) -> Any:
        return [[file.name, *_stamp(file.path)] for file in self.local_files]

    def cached_content(self) -> Any:
        return [[file.path.suffix.lower(), _known_content(file.path, *_stamp(file.path))] for file in self.local_files]

    def files(self) -> Sequence[SourceFile]:
        return self.local_files


def open_sample(context: SourceContext) -> LocalSource:
    return LocalSource([SourceFile(SAMPLE.name, SAMPLE)])


def open_local(context: SourceContext) -> LocalSource:
    """A file, or all files of a folder that have a supported format."""
    return LocalSource(_local_files(context.config.source, context.root))


def _local_files(source: str, root: Path) -> list[SourceFile]:
    path = root / Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_rows(file, path))
        if not files:
            raise DataError(f"{path}: this folder contains no file that ends in {ENDINGS}")
        return [SourceFile(file.relative_to(path).as_posix(), file) for file in files]
    if not path.is_file():
        raise DataError(
            f"{path}: does not exist; `source` in raw_data.yaml, or FINETUNE_RAW_DATA, is '{source}': "
            "name a file, a folder, s3://bucket/prefix, hf://datasets/owner/name, or 'sample'"
        )
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unsupported file format; supported: {ENDINGS}")
    return [SourceFile(path.name, path)]


def _is_rows(file: Path, folder: Path) -> bool:
    """Whether a file contains rows; hidden files are excluded, because they may be partial downloads."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in READERS and file.is_file() and not hidden


def _content_of(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e


def _stamp(path: Path) -> tuple[int, int, int, int]:
    """Size, times and inode: metadata that changes when a file's bytes change.

    Raises:
        DataError: if the file does not exist any more.
    """
    try:
        status = path.stat()
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@lru_cache(maxsize=100_000)
def _known_content(path: Path, *stamp: int) -> str:
    return _content_of(path)


@lru_cache(maxsize=100_000)
def _known_rows(path: Path, *stamp: int) -> int:
    return sum(1 for _ in read_records(path))


def count_rows(file: SourceFile) -> int:
    """Number of rows of a file, good and bad; a file with unchanged metadata is not read again."""
    return _known_rows(file.path, *_stamp(file.path))
