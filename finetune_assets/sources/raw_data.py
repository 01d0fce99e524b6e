"""Where raw data comes from: the packaged sample, files of this machine or of S3, or a Hub dataset at a commit."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from uuid import uuid4

from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.config.schema import HubDataset, RawDataConfig
from finetune_assets.data.errors import DataError, Unreachable
from finetune_assets.data.readers import READERS, SourceFile, read_records
from finetune_assets.sources import hub
from finetune_assets.store.hashing import sha256

SAMPLE = Path(__file__).parent.parent / "sample" / "dolly_sample.jsonl"
HUB, S3 = "hf://", "s3://"
HUB_DATASET = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+|[^/@]+)(@(?P<revision>[^@]+))?/?")
ENDINGS = ", ".join(READERS)


class Source(Protocol):
    """One version of the raw data."""

    def content(self) -> Any:
        """Plain data that pins every byte; asked anew each time, so a change while reading is seen."""

    def glance(self) -> Any:
        """Plain data that changes whenever the content may have; nothing is read."""

    def remembered(self) -> Any:
        """`content`, but what has not changed by the looks of it since this process read it is not read again."""

    def files(self) -> Sequence[SourceFile]:
        """The files, in reading order, on this machine."""


@dataclass(frozen=True)
class LocalSource:
    """Files of this machine."""

    found: Sequence[SourceFile]

    def content(self) -> Any:
        return [[file.path.suffix.lower(), _content_of(file.path)] for file in self.found]

    def glance(self) -> Any:
        return [[file.name, *_stamp(file.path)] for file in self.found]

    def remembered(self) -> Any:
        return [[file.path.suffix.lower(), _known_content(file.path, *_stamp(file.path))] for file in self.found]

    def files(self) -> Sequence[SourceFile]:
        return self.found


@dataclass(frozen=True)
class HubSource:
    """A Hub dataset at a commit. Its own files are read, by the same readers as any other, so that a bad row is told by
    file and line; `datasets` says which files a subset and split are."""

    repo: str
    commit: str
    part: HubDataset

    def content(self) -> Any:
        return {"repo": self.repo, "commit": self.commit, "subset": self.part.subset, "split": self.part.split}

    def glance(self) -> Any:
        return self.content()

    def remembered(self) -> Any:
        return self.content()

    def files(self) -> Sequence[SourceFile]:
        """Download the split's files.

        Raises:
            DataError: if the Hub does not give them, there is no such subset or split, or we cannot read their format.
        """
        with hub.explained(DataError, self._where, f"datasets/{self.repo}", "Or name a file or folder"):
            # Before datasets is asked, whose refusals say less
            tree = hub.files_of(self.repo, self.commit, "dataset")
            names = self._names()
            if unknown := next((name for name in names if PurePosixPath(name).suffix.lower() not in READERS), None):
                raise DataError(f"{self._where}: {unknown} is of a format that is not read; read are {ENDINGS}")
            folder = hub.download(self.repo, self.commit, [tree[name] for name in names], "dataset")
            return [SourceFile(name, folder / name) for name in names]

    @property
    def _where(self) -> str:
        return f"source: '{HUB}datasets/{self.repo}' at '{self.commit}'"

    def _names(self) -> list[str]:
        from datasets import DownloadConfig, load_dataset_builder

        prefix = f"{HUB}datasets/{self.repo}@{self.commit}/"
        token = hub.client().token or False
        try:
            builder = load_dataset_builder(
                self.repo,
                self.part.subset,
                revision=self.commit,
                token=token,
                download_config=DownloadConfig(token=token, disable_tqdm=True),
            )
        except (ValueError, RuntimeError, FileNotFoundError) as e:  # no such subset, a loading script, no data files
            raise DataError(f"{self._where}, hub.subset {self.part.subset}: {e}") from e
        splits = builder.config.data_files or {}
        if self.part.split not in splits:
            raise DataError(f"{self._where}: no split '{self.part.split}'; found {', '.join(map(str, splits))}")
        files = [str(file) for file in splits[self.part.split]]
        if elsewhere := next((file for file in files if not file.startswith(prefix)), None):
            raise DataError(f"{self._where}: {elsewhere} lies outside this commit")
        return [file.removeprefix(prefix) for file in files]


@dataclass(frozen=True)
class S3Source:
    """The objects below a prefix, downloaded once each for a version of theirs.

    What pins the bytes is their hash, as everywhere: an ETag depends on how they were uploaded.

    Attributes:
        url: `s3://bucket/prefix`.
        connect: Makes boto3's client.
        folder: Where downloads are kept.
    """

    url: str
    connect: Callable[[], Any]
    folder: Path

    def content(self) -> Any:
        return LocalSource(self.files()).content()

    def glance(self) -> Any:
        return [[key, size, etag] for key, size, etag in self._objects]

    def remembered(self) -> Any:
        return LocalSource(self.files()).remembered()

    def files(self) -> Sequence[SourceFile]:
        """Download the objects.

        Raises:
            DataError: if one cannot be read, or is another one by now.
        """
        bucket, prefix = self._place
        found = []
        for key, _, etag in self._objects:
            version = fingerprint(bucket=bucket, key=key, etag=etag)
            path = self.folder / version / PurePosixPath(key).name
            if not path.exists():
                self._download(key, etag, path)
            found.append(SourceFile(key.removeprefix(prefix).lstrip("/") or PurePosixPath(key).name, path))
        return found

    def _download(self, key: str, etag: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(f".{uuid4().hex}")
        try:
            body = self._client.get_object(Bucket=self._place[0], Key=key, IfMatch=etag)["Body"]
            with partial_file.open("wb") as file:
                for part in body.iter_chunks(1 << 20):
                    file.write(part)
            partial_file.replace(path)
        except _s3_errors() as e:
            raise self._unreadable(e, key) from e
        finally:
            partial_file.unlink(missing_ok=True)

    @property
    def _place(self) -> tuple[str, str]:
        bucket, _, prefix = self.url.removeprefix(S3).partition("/")
        return bucket, prefix

    @cached_property
    def _client(self) -> Any:
        return self.connect()

    @cached_property
    def _objects(self) -> list[tuple[str, int, str]]:
        """Key, size and ETag of each object that holds rows, by key."""
        bucket, prefix = self._place
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            listed = [entry for page in pages for entry in page.get("Contents", ())]
        except _s3_errors() as e:
            raise self._unreadable(e) from e
        kept = [entry for entry in listed if self._holds_rows(entry["Key"])]
        if not kept:
            raise DataError(f"source: '{self.url}' holds no object that ends in {ENDINGS}")
        return sorted((entry["Key"], entry["Size"], entry["ETag"]) for entry in kept)

    def _holds_rows(self, key: str) -> bool:
        path = PurePosixPath(key)
        return path.suffix.lower() in READERS and not any(part.startswith(".") for part in path.parts)

    def _unreadable(self, error: Exception, key: str = "") -> Unreachable:
        where = f"{S3}{self._place[0]}/{key}" if key else self.url
        return Unreachable(f"source: {where} cannot be read: {error}; see AWS_ENDPOINT_URL_S3 and the credentials")


ASK_HUB = partial(hub.commit_of, repo_type="dataset")


def open_source(
    config: RawDataConfig,
    root: Path,
    commit_of: Callable[[str, str], str] = ASK_HUB,
    connect: Callable[[], Any] | None = None,
    downloads: Path | None = None,
) -> Source:
    """What `source` means.

    Args:
        config: The raw data's settings.
        root: What a relative path is relative to.
        commit_of: Says which commit a revision of a Hub dataset is.
        connect: Makes boto3's client, for a source on S3.
        downloads: Where objects of S3 are kept.

    Raises:
        DataError: if there is nothing to read there.
    """
    if config.source == "sample":
        return LocalSource([SourceFile(SAMPLE.name, SAMPLE)])
    if config.source.startswith(HUB):
        return _hub_source(config, commit_of)
    if config.source.startswith(S3):
        if connect is None or downloads is None:
            raise DataError(f"source: '{config.source}': S3 is not read here")
        return S3Source(config.source, connect, downloads)
    return LocalSource(_local_files(config.source, root))


def _hub_source(config: RawDataConfig, commit_of: Callable[[str, str], str]) -> HubSource:
    match = HUB_DATASET.fullmatch(config.source)
    if not match:
        raise DataError(
            f"source: '{config.source}' must be hf://datasets/owner/name, or hf://datasets/owner/name@revision"
        )
    repo, revision = match["repo"], match["revision"] or "main"
    where = f"source: '{config.source}'"
    with hub.explained(DataError, where, f"datasets/{repo}", "Or name a file or folder"):
        return HubSource(repo, commit_of(repo, revision), config.hub)


def _local_files(source: str, root: Path) -> list[SourceFile]:
    path = root / Path(source).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _is_rows(file, path))
        if not found:
            raise DataError(f"{path}: this folder holds no file that ends in {ENDINGS}")
        return [SourceFile(file.relative_to(path).as_posix(), file) for file in found]
    if not path.is_file():
        raise DataError(
            f"{path}: does not exist; `source` in raw_data.yaml, or FINETUNE_RAW_DATA, is '{source}': "
            "name a file, a folder, s3://bucket/prefix, hf://datasets/owner/name, or 'sample'"
        )
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: rows are read from files that end in {ENDINGS}")
    return [SourceFile(path.name, path)]


def _is_rows(file: Path, folder: Path) -> bool:
    """Whether a file holds rows; what begins with a dot is some program's own, half a download say."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in READERS and file.is_file() and not hidden


def _content_of(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e


def _stamp(path: Path) -> tuple[int, int, int, int]:
    """Size, times and inode: what changes with a file's bytes, as far as one can tell from outside.

    Raises:
        DataError: if the file has gone.
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
    """Rows of a file, good and bad; one that has not changed by the looks of it is not read again."""
    return _known_rows(file.path, *_stamp(file.path))


def _s3_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError  # takes a fifth of a second

    return BotoCoreError, ClientError
