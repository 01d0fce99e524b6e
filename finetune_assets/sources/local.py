"""Raw data from local files, and from the packaged sample."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers import ROW_FORMATS, Formats, SourceFile, read_records
from finetune_assets.sources import names
from finetune_assets.sources.listing import list_names, refuse_saved_dataset
from finetune_assets.sources.source import SourceContext
from finetune_assets.store.hashing import sha256

SAMPLE = Path(__file__).parent.parent / "sample" / "dolly_sample.jsonl"
SAMPLE_TOWNS = SAMPLE.with_name("towns.jsonl")


@dataclass(frozen=True)
class LocalSource:
    """Local files.

    Attributes:
        local_files: Files of rows.
        other_files: Names of other files of the folder.
        formats: File formats that are read.
    """

    local_files: Sequence[SourceFile]
    other_files: Sequence[str] = ()
    formats: Formats = ROW_FORMATS
    is_pinned = False

    def content(self) -> Any:
        return [[self.formats.suffix_of(file.path), _content_of(file.path)] for file in self.local_files]

    def peek(self) -> Any:
        return [[file.name, *_stamp(file.path)] for file in self.local_files]

    def cached_content(self) -> Any:
        return [
            [self.formats.suffix_of(file.path), _known_content(file.path, *_stamp(file.path))]
            for file in self.local_files
        ]

    def files(self) -> Sequence[SourceFile]:
        return self.local_files

    def ignored_files(self) -> Sequence[str]:
        return self.other_files


def open_packaged(context: SourceContext) -> LocalSource:
    """Packaged rows, by the name of the source."""
    path = {names.SAMPLE: SAMPLE, names.SAMPLE_TOWNS: SAMPLE_TOWNS}[context.config.source]
    return LocalSource([SourceFile(path.name, path)])


def open_local(context: SourceContext) -> LocalSource:
    """A file, or all files of a folder that have a supported format."""
    source = context.config.source
    path = context.root / Path(source).expanduser()
    if path.is_dir():
        return _folder(path, context.formats)
    if not path.is_file():
        raise DataError(
            f"{path}: does not exist; {context.setting} is '{source}': "
            "name a file, a folder, s3://bucket/prefix, hf://datasets/owner/name, or 'sample'"
        )
    if not context.formats.suffix_of(path):
        raise DataError(f"{path}: unsupported file format; supported: {context.formats.shown}")
    if path.suffix.lower() == ".arrow":
        refuse_saved_dataset([file.name for file in path.parent.iterdir()], str(path.parent))
    return LocalSource([SourceFile(path.name, path)], formats=context.formats)


def _folder(folder: Path, formats: Formats) -> LocalSource:
    """All files of a folder and the folders in it, also behind links; a file that several names reach is read once."""
    paths = sorted(_walk(folder))
    listing = list_names([path.relative_to(folder).as_posix() for path in paths], str(folder), formats)
    first_names: dict[str, str] = {}
    for name in sorted(listing.rows, key=lambda name: (folder / name).is_symlink()):  # a file before links to it
        if not (folder / name).is_file():
            _refuse_broken_link(folder / name)
        first_names.setdefault(os.path.realpath(folder / name), name)
    read = {*first_names.values()}
    repeated = [
        f"{name} (the same file as {first_names[os.path.realpath(folder / name)]})"
        for name in listing.rows
        if name not in read
    ]
    if not read:
        raise DataError(f"{folder}: this folder contains no file that ends in {formats.shown}")
    others = [name if (folder / name).exists() else f"{name} (broken link)" for name in listing.ignored]
    files = [SourceFile(name, folder / name) for name in listing.rows if name in read]
    return LocalSource(files, others + repeated, formats)


def _walk(folder: Path) -> Iterator[Path]:
    """Every file that is not in a hidden folder. Each folder is read once, under its own name rather than a link's."""
    pending, seen = deque([folder]), set[str]()
    while pending:
        for place, folders, files in os.walk(pending.popleft(), onerror=_refuse_folder):
            here = os.path.realpath(place)
            if here in seen:
                folders.clear()
                continue
            seen.add(here)
            folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
            pending += [path for name in folders if (path := Path(place, name)).is_symlink()]
            yield from (Path(place, name) for name in files)


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename}: this folder cannot be read: {error.strerror}") from error


def _refuse_broken_link(path: Path) -> None:
    problem = f"broken link to {path.readlink()}" if path.is_symlink() else "not a file"
    raise DataError(f"{path}: {problem}; repair or remove it")


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
