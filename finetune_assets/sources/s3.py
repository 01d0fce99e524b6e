"""Raw data from S3."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.data.errors import DataError, Unreachable
from finetune_assets.data.readers import READERS, SourceFile
from finetune_assets.sources.local import LocalSource
from finetune_assets.sources.source import ENDINGS, SourceContext

S3 = "s3://"


@dataclass(frozen=True)
class S3Source:
    """The objects below an S3 prefix; each version of an object is downloaded once.

    The content is identified by file hashes, as for all sources: an ETag depends on how an object was uploaded.

    Attributes:
        url: `s3://bucket/prefix`.
        connect: Creates the boto3 client.
        folder: Folder for downloads.
    """

    url: str
    connect: Callable[[], Any]
    folder: Path
    is_pinned = False

    def content(self) -> Any:
        return LocalSource(self.files()).content()

    def peek(self) -> Any:
        return [[key, size, etag] for key, size, etag in self._objects]

    def cached_content(self) -> Any:
        return LocalSource(self.files()).cached_content()

    def files(self) -> Sequence[SourceFile]:
        """Download the objects.

        Raises:
            DataError: if an object cannot be read, or has changed since it was listed.
        """
        bucket, prefix = self._place
        files = []
        for key, _, etag in self._objects:
            version = fingerprint(bucket=bucket, key=key, etag=etag)
            path = self.folder / version / PurePosixPath(key).name
            if not path.exists():
                self._download(key, etag, path)
            files.append(SourceFile(key.removeprefix(prefix).lstrip("/") or PurePosixPath(key).name, path))
        return files

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
        """Key, size and ETag of each object that contains rows, sorted by key."""
        bucket, prefix = self._place
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            listed = [entry for page in pages for entry in page.get("Contents", ())]
        except _s3_errors() as e:
            raise self._unreadable(e) from e
        kept = [entry for entry in listed if self._holds_rows(entry["Key"])]
        if not kept:
            raise DataError(f"source: '{self.url}' contains no object that ends in {ENDINGS}")
        return sorted((entry["Key"], entry["Size"], entry["ETag"]) for entry in kept)

    def _holds_rows(self, key: str) -> bool:
        path = PurePosixPath(key)
        return path.suffix.lower() in READERS and not any(part.startswith(".") for part in path.parts)

    def _unreadable(self, error: Exception, key: str = "") -> Unreachable:
        where = f"{S3}{self._place[0]}/{key}" if key else self.url
        return Unreachable(f"source: {where} cannot be read: {error}; check AWS_ENDPOINT_URL_S3 and the credentials")


def open_s3(context: SourceContext) -> S3Source:
    """The objects below a prefix.

    Raises:
        DataError: where S3 is not available.
    """
    if context.connect is None or context.downloads is None:
        raise DataError(f"source: '{context.config.source}': S3 is not supported here")
    return S3Source(context.config.source, context.connect, context.downloads)


def _s3_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError  # imported here because it takes 0.2 s

    return BotoCoreError, ClientError
