"""Raw data from S3."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.data.errors import DataError, Unreachable
from finetune_assets.data.readers import ROW_FORMATS, Formats, SourceFile
from finetune_assets.sources.listing import Listing, list_names
from finetune_assets.sources.local import LocalSource
from finetune_assets.sources.source import SourceContext
from finetune_assets.store import modes

S3 = "s3://"


@dataclass(frozen=True)
class S3Source:
    """The objects of an S3 folder, or a single object; each version of an object is downloaded once.

    `s3://bucket/rows` names all objects whose keys begin with `rows/`, and none of `rows-old/`. The content is
    identified by file hashes, as for all sources: an ETag depends on how an object was uploaded.

    Attributes:
        url: `s3://bucket/folder`, or `s3://bucket/folder/rows.jsonl`.
        connect: Creates the boto3 client.
        folder: Folder for downloads.
        formats: File formats that are read.
    """

    url: str
    connect: Callable[[], Any]
    folder: Path
    formats: Formats = ROW_FORMATS
    is_pinned = False

    def content(self) -> Any:
        return LocalSource(self.files(), formats=self.formats).content()

    def peek(self) -> Any:
        return [[key, size, etag] for key, size, etag in self._objects]

    def cached_content(self) -> Any:
        return LocalSource(self.files(), formats=self.formats).cached_content()

    def files(self) -> Sequence[SourceFile]:
        """Download the objects.

        Raises:
            DataError: if an object cannot be read, or has changed since it was listed.
        """
        bucket, _ = self._place
        files = []
        for key, _, etag in self._objects:
            version = fingerprint(bucket=bucket, key=key, etag=etag)
            path = self.folder / version / PurePosixPath(key).name
            if not path.exists():
                self._download(key, etag, path)
            files.append(SourceFile(self._name(key), path))
        return files

    def ignored_files(self) -> Sequence[str]:
        return self._listing.ignored

    def _download(self, key: str, etag: str, path: Path) -> None:
        modes.make_folders(path.parent)
        partial_file = path.with_name(f".{uuid4().hex}")
        try:
            body = self._client.get_object(Bucket=self._place[0], Key=key, IfMatch=etag)["Body"]
            with open(partial_file, "wb", opener=modes.private) as file:
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
    def _listed(self) -> dict[str, tuple[int, str]]:
        """Size and ETag of the named object, or of each object of the named folder, by key."""
        bucket, place = self._place
        folder = f"{place.rstrip('/')}/" if place else ""
        # The longer prefix is the shorter list: that of `rows` has the objects of `rows-old` too
        prefix = place if self.formats.suffix_of(place) and not place.endswith("/") else folder
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            entries = [entry for page in pages for entry in page.get("Contents", ())]
        except _s3_errors() as e:
            raise self._unreadable(e) from e
        objects = {entry["Key"]: (entry["Size"], entry["ETag"]) for entry in entries if not entry["Key"].endswith("/")}
        inside = {key: objects[key] for key in sorted(objects) if key.startswith(folder)}
        if place not in objects:
            return inside
        if inside:
            raise DataError(f"source: '{self.url}' is both an object and a folder; end the folder's URL with '/'")
        return {place: objects[place]}

    @cached_property
    def _listing(self) -> Listing:
        names = {self._name(key): key for key in self._listed}
        listing = list_names(names, f"source: '{self.url}'", self.formats)
        if not listing.rows:
            raise DataError(
                f"source: '{self.url}' contains no object that ends in {self.formats.shown}; a URL names an object "
                "or a folder, not the beginning of a name"
            )
        return listing

    @property
    def _objects(self) -> list[tuple[str, int, str]]:
        """Key, size and ETag of each object that contains rows, sorted by key."""
        rows = {*self._listing.rows}
        return [(key, *stamp) for key, stamp in self._listed.items() if self._name(key) in rows]

    def _name(self, key: str) -> str:
        """Name of an object relative to the source."""
        place = self._place[1]
        return PurePosixPath(key).name if key == place else key.removeprefix(place).lstrip("/")

    def _unreadable(self, error: Exception, key: str = "") -> Unreachable:
        where = f"{S3}{self._place[0]}/{key}" if key else self.url
        return Unreachable(f"source: {where} cannot be read: {error}; check AWS_ENDPOINT_URL_S3 and the credentials")


def open_s3(context: SourceContext) -> S3Source:
    """An object, or the objects of a folder.

    Raises:
        DataError: where S3 is not available.
    """
    if context.connect is None or context.downloads is None:
        raise DataError(f"source: '{context.config.source}': S3 is not supported here")
    return S3Source(context.config.source, context.connect, context.downloads, context.formats)


def _s3_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError  # imported here because it takes 0.2 s

    return BotoCoreError, ClientError
