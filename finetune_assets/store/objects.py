"""Object storage below one URL: a folder, or a bucket on S3 or an S3-compatible server.

obstore performs the transfers (reasons: benchmarks/RESULTS.md). It retries single requests and resumes interrupted
downloads. This module retries whole operations, and reports permanent errors in one line.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore

from finetune_assets.display import shown_url
from finetune_assets.store.errors import StoreError, UnreadableObject
from finetune_assets.store.folder import FULL, Folder

MIB = 1 << 20
CHUNK = 4 * MIB
PART, PARTS_AT_ONCE, MAX_PARTS = 8 * MIB, 4, 10_000
"""Size of an upload part in bytes, concurrent parts per file, and the maximum number of parts on S3."""
TRIES = 3
PAUSE_SECONDS = 2.0
RETRIES = {
    "max_retries": 8,
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2},
    "retry_timeout": timedelta(minutes=2),
}
TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "6h"}
"""`read_timeout` aborts a stalled connection; `timeout` covers a whole request, for a file of any size."""
CREDENTIALS_TTL = timedelta(minutes=5)
"""Time before credentials are requested again: botocore renews temporary ones ten minutes before they expire."""

CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
EXPIRED = "the credentials have expired; log in again, or set a new AWS_SESSION_TOKEN"
REGION = "the bucket is in another region; set AWS_DEFAULT_REGION to it"
ADVICE = {
    "NoSuchBucket": "bucket not found; create it, or correct FINETUNE_STORE",
    "ExpiredToken": EXPIRED,
    "ExpiredTokenException": EXPIRED,
    "TokenRefreshRequired": EXPIRED,
    "RequestExpired": EXPIRED,
    "InvalidToken": EXPIRED,
    "InvalidAccessKeyId": f"unknown access key; {CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not match the access key; {CREDENTIALS}",
    "AccessDenied": "access denied; the credentials need s3:ListBucket on the bucket, and s3:GetObject, s3:PutObject, "
    "s3:DeleteObject and s3:AbortMultipartUpload on its objects",
    "AllAccessDisabled": "access to this bucket is disabled",
    "AccountProblem": "problem with the account; contact its owner",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; synchronize it",
    "PermanentRedirect": REGION,
    "AuthorizationHeaderMalformed": REGION,
    "IllegalLocationConstraintException": REGION,
    "QuotaExceeded": FULL,
    "EntityTooLarge": "the object is larger than the server accepts",
    "InvalidBucketName": "invalid bucket name; correct FINETUNE_STORE",
}
"""Advice for errors that a retry cannot fix, by S3 error code."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class ObjectInfo:
    """An object in a listing.

    Attributes:
        key: Key relative to the store's URL.
        size: Size in bytes.
        modified: Time of the last write.
    """

    key: str
    size: int
    modified: datetime


def boto3_client() -> Any:
    """Create an S3 client configured by AWS_* variables, a profile, or the machine's role."""
    import boto3

    return boto3.Session().client("s3")


class ObjectStorage:
    """Objects by key below one URL. Connects at the first use.

    Args:
        url: `file:///folder`, or `s3://bucket` or `s3://bucket/prefix`.
        connect: Returns the boto3 client that provides the endpoint and the region.

    Raises:
        StoreError: If the URL is invalid.
    """

    def __init__(self, url: str, connect: Callable[[], Any] = boto3_client) -> None:
        self.url = url.rstrip("/")
        self._connect = connect
        scheme, _, rest = self.url.partition("://")
        if "@" in rest and scheme != "file":
            raise StoreError(
                f"FINETUNE_STORE: the URL must not contain credentials ({shown_url(self.url)}); "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        parts = urlsplit(self.url)
        self.is_local = scheme == "file" and rest.startswith("/")
        if not self.is_local and not (scheme == "s3" and parts.netloc and not parts.query and not parts.fragment):
            raise StoreError(
                f"FINETUNE_STORE: invalid URL '{shown_url(url)}'; use file:///an/absolute/folder or s3://bucket/prefix"
            )
        self.path = rest if self.is_local else parts.path.strip("/")
        self.bucket = "" if self.is_local else parts.netloc

    @cached_property
    def folder(self) -> Folder:
        return Folder(self.url, Path(self.path))

    @cached_property
    def backend(self) -> ObjectStore:
        environment = hash(tuple(sorted((name, os.environ[name]) for name in os.environ if name.startswith("AWS_"))))
        return _s3_store(self.bucket, self.path, self._connect, environment)

    def get(self, key: str, most: int | None = None) -> bytes:
        """Return an object's content.

        Args:
            key: Key of the object.
            most: Largest accepted size in bytes.

        Raises:
            FileNotFoundError: If the object does not exist.
            UnreadableObject: If it is larger than `most`; in a folder, also if it is a link or access is denied.
        """
        if self.is_local:
            with self.folder.open(key) as file:
                self._check_size(key, os.fstat(file.fileno()).st_size, most)
                return file.read() if most is None else file.read(most + 1)[:most]

        def attempt() -> bytes:
            answer = obstore.get(self.backend, key)
            self._check_size(key, answer.meta["size"], most)
            return bytes(answer.bytes())

        return self.with_retries(key, attempt)

    def _check_size(self, key: str, size: int, most: int | None) -> None:
        if most is not None and size > most:
            raise UnreadableObject(f"{self.url}/{key}: {size:,} bytes, at most {most:,} are read; delete it")

    def stream(self, key: str) -> Iterator[bytes]:
        """Yield an object's content in chunks of about 4 MiB. Wrap the read in `with_retries` for error handling."""
        if self.is_local:
            with self.folder.open(key) as file:
                while chunk := file.read(CHUNK):
                    yield chunk
            return
        for chunk in obstore.get(self.backend, key).stream(min_chunk_size=CHUNK):
            yield memoryview(chunk)  # type: ignore[misc]

    def put(self, key: str, content: bytes) -> None:
        """Write a small object, replacing an existing one."""
        if self.is_local:
            self.folder.write(key, [content])
        else:
            self.with_retries(key, lambda: obstore.put(self.backend, key, content))

    def create(self, key: str, content: bytes) -> bool:
        """Write a small object unless it exists; return whether it now has this content."""
        if self.is_local:
            return self.folder.write(key, [content], replace=False) or self.get(key) == content

        def attempt() -> bool:
            try:
                obstore.put(self.backend, key, content, mode="create")
            except AlreadyExistsError:
                # An earlier attempt may have succeeded with its response lost
                return bytes(obstore.get(self.backend, key).bytes()) == content
            return True

        return self.with_retries(key, attempt)

    def upload(self, key: str, size: int, chunks: Callable[[], Iterator[bytes]]) -> None:
        """Write an object of any size. It becomes visible only when the upload is complete.

        Args:
            key: Key of the object.
            size: Size in bytes.
            chunks: Starts reading the content; called again for each attempt.
        """
        if self.is_local:
            self.folder.write(key, chunks())
            return
        part = max(PART, -(-size // MAX_PARTS))

        def attempt() -> None:
            source = _Source(chunks())
            try:
                if size <= part:
                    obstore.put(self.backend, key, b"".join(source), use_multipart=False)
                else:
                    obstore.put(self.backend, key, source, chunk_size=part, max_concurrency=PARTS_AT_ONCE)
            except BaseError:
                if source.error:
                    raise source.error from None
                raise

        self.with_retries(key, attempt)

    def listing(self, prefix: str = "", skipped: dict[str, str] | None = None) -> Iterator[ObjectInfo]:
        """Yield all objects with a key below `prefix` (matched by whole path segments).

        Args:
            prefix: Key prefix; empty for all objects.
            skipped: Receives what a folder contains besides objects, such as links: the reason by key.
        """
        if self.is_local:
            for file in self.folder.listing(prefix, {} if skipped is None else skipped):
                yield ObjectInfo(file.key, file.size, datetime.fromtimestamp(file.modified, UTC))
            return
        with self.explained(prefix):
            for batch in obstore.list(self.backend, prefix or None):
                for meta in batch:
                    yield ObjectInfo(meta["path"], meta["size"], meta["last_modified"])

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are ignored."""
        keys = list(keys)
        if self.is_local:
            self.folder.delete(keys)
        elif keys:
            with self.explained(keys[0]):
                try:
                    obstore.delete(self.backend, keys)
                except FileNotFoundError as e:
                    if _code(e) == "NoSuchBucket":
                        raise
                    for key in keys:
                        _delete_if_there(self.backend, key)

    def abort_uploads(self, prefix: str, before: datetime, dry_run: bool) -> list[str]:
        """Find unfinished uploads below `prefix` that started before `before`; abort them unless `dry_run`."""
        uploads = self._local_uploads(prefix) if self.is_local else self._s3_uploads(prefix)
        old = [(key, abort) for key, began, abort in uploads if began < before]
        for _, abort in old:
            if not dry_run:
                abort()
        return [key for key, _ in old]

    def _s3_uploads(self, prefix: str) -> Iterator[tuple[str, datetime, Callable[[], Any]]]:
        from botocore.exceptions import BotoCoreError, ClientError

        client, root = self._connect(), f"{self.path}/" if self.path else ""
        try:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=root + prefix)
            for upload in (upload for page in pages for upload in page.get("Uploads", ())):
                target = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                abort = lambda target=target: client.abort_multipart_upload(**target)  # noqa: E731
                yield upload["Key"].removeprefix(root), upload["Initiated"], abort
        except (ClientError, BotoCoreError) as e:
            raise StoreError(f"{self.url}: cannot list unfinished uploads ({e})") from e

    def _local_uploads(self, prefix: str) -> Iterator[tuple[str, datetime, Callable[[], Any]]]:
        for file in self.folder.listing(prefix, {}, staged=True):
            began = datetime.fromtimestamp(file.modified, UTC)
            yield file.key, began, lambda key=file.key: self.folder.delete([key])  # type: ignore[misc]

    def with_retries(self, key: str, attempt: Callable[[], T]) -> T:
        """Run an operation, retrying transient errors.

        Args:
            key: Key of the object, for error messages.
            attempt: The operation; called once for each try.

        Raises:
            FileNotFoundError: If the object does not exist.
            StoreError: For any other error, with the store, the key and what to do.
        """
        with self.explained(key):
            for left in reversed(range(1 if self.is_local else TRIES)):
                try:
                    return attempt()
                except BaseError as e:
                    if left == 0 or _code(e) in ADVICE:
                        raise
                    logger.warning("%s/%s: %s; retrying in %g s", self.url, key, _summary(e), PAUSE_SECONDS)
                    time.sleep(PAUSE_SECONDS)
                except FileNotFoundError as e:
                    # A completion request without a response is repeated, and the upload is then not found
                    if left == 0 or _code(e) != "NoSuchUpload":
                        raise
        raise AssertionError("unreachable")

    @contextmanager
    def explained(self, key: str) -> Iterator[None]:
        """Convert errors of the store into a one-line `StoreError` with advice. `FileNotFoundError` passes through."""
        where = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except FileNotFoundError as e:
            if _code(e) == "NoSuchBucket":
                raise StoreError(f"{self.url}: {ADVICE['NoSuchBucket']}") from e
            raise
        except BaseError as e:
            advice = ADVICE.get(_code(e))
            raise StoreError(f"{where}: {advice or f'{_summary(e)}; try again later'} ({_code(e) or _kind(e)})") from e


class _Source:
    """An iterator that keeps the exception which ended it: obstore reports only its own errors."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks
        self.error: BaseException | None = None

    def __iter__(self) -> "_Source":
        return self

    def __next__(self) -> bytes:
        try:
            return next(self.chunks)
        except StopIteration:
            raise
        except BaseException as e:
            self.error = e
            raise


@lru_cache(maxsize=8)
def _s3_store(bucket: str, prefix: str, connect: Callable[[], Any], environment: int) -> ObjectStore:
    """Create one connection pool per process and configuration (`environment` is the hash of the AWS_* variables)."""
    import boto3
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    try:
        meta = connect().meta
        provider = Boto3CredentialProvider(boto3.Session(), ttl=CREDENTIALS_TTL)
    except (BotoCoreError, ValueError) as e:
        reason = f"{e}; " if isinstance(e, BotoCoreError) else ""
        raise StoreError(
            f"FINETUNE_STORE: s3://{bucket}: no credentials; {reason}set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or assign an IAM role to this machine"
        ) from e
    region = meta.region_name if meta.region_name not in (None, "aws-global") else "us-east-1"
    bundle = os.environ.get("AWS_CA_BUNDLE")
    trust = {"root_certificate": Path(bundle).read_bytes()} if bundle else {}
    plain = meta.endpoint_url.startswith("http://")
    return S3Store(
        bucket,
        prefix=prefix or None,
        # In obstore, AWS_ENDPOINT_URL_S3 overrides `endpoint`, but not the option of the same name
        config={"aws_endpoint_url_s3": meta.endpoint_url, "region": region},
        client_options={**TIMEOUTS, **trust, "allow_http": plain},
        retry_config=RETRIES,
        credential_provider=provider,
    )


def _delete_if_there(backend: ObjectStore, key: str) -> None:
    with suppress(FileNotFoundError):
        obstore.delete(backend, key)


def _code(error: Exception) -> str:
    """Return the S3 error code, or an empty string."""
    if match := re.search(r"<Code>(\w+)</Code>", str(error)):
        return match[1]
    return "PermanentRedirect" if "redirect without LOCATION" in str(error) else ""


def _kind(error: Exception) -> str:
    status = re.search(r"status code: (\d+ [\w ]+)", str(error))
    return status[1] if status else type(error).__name__


def _summary(error: Exception) -> str:
    """Return the first line of an error, without the repeated request."""
    line = re.sub(r"^(Generic \w+ error: )+", "", str(error).splitlines()[0])
    line = re.sub(r"Error performing (\w+) \S+ in [\w.µ]+(, after \d+ retries[^-]*)? +- ", r"\1: ", line)
    line = re.sub(r": <\?xml.*", "", line)
    return "cannot reach the server; check AWS_ENDPOINT_URL_S3" if "error sending request" in line else line
