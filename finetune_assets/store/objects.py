"""Objects by key behind one URL: a folder, or a bucket of S3 or of a server that speaks as S3 does.

obstore does the transfers (why: benchmarks/RESULTS.md). It retries what a request can be retried for and resumes a
download that was cut; what is left to retry whole is retried here, and what cannot be helped is told in one line.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore

from finetune_assets.store.errors import StoreError

MIB = 1 << 20
CHUNK = 4 * MIB
PART, PARTS_AT_ONCE, MOST_PARTS = 8 * MIB, 4, 10_000
"""A part of an upload, how many of one file are under way, and how many S3 allows."""
TRIES = 3
PAUSE_SECONDS = 2.0
RETRIES = {
    "max_retries": 8,
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2},
    "retry_timeout": timedelta(minutes=2),
}
TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "6h"}
"""`read_timeout` ends a connection that stalls; `timeout` is of a whole request, and a file of any size is one."""
CREDENTIALS_LIVE = timedelta(minutes=5)
"""How long before credentials are asked for anew: botocore renews temporary ones ten minutes before they end."""

CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
EXPIRED = "the credentials have expired; log in again, or set a new AWS_SESSION_TOKEN"
REGION = "the bucket is in another region; set AWS_DEFAULT_REGION to it"
FULL = "no space left; free some, or raise the quota"
ADVICE = {
    "NoSuchBucket": "there is no such bucket; create it, or correct FINETUNE_STORE",
    "ExpiredToken": EXPIRED,
    "ExpiredTokenException": EXPIRED,
    "TokenRefreshRequired": EXPIRED,
    "RequestExpired": EXPIRED,
    "InvalidToken": EXPIRED,
    "InvalidAccessKeyId": f"the server does not know this access key; {CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key is not the access key's; {CREDENTIALS}",
    "AccessDenied": "not allowed; the credentials need s3:ListBucket on the bucket, and s3:GetObject, s3:PutObject, "
    "s3:DeleteObject and s3:AbortMultipartUpload on its objects",
    "AllAccessDisabled": "access to this bucket is disabled",
    "AccountProblem": "there is a problem with the account; ask its owner",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": REGION,
    "AuthorizationHeaderMalformed": REGION,
    "IllegalLocationConstraintException": REGION,
    "QuotaExceeded": FULL,
    "EntityTooLarge": "the object is larger than the server takes",
    "InvalidBucketName": "not a name of a bucket; correct FINETUNE_STORE",
}
"""What to do about each refusal that trying again cannot help, by S3's own code."""
LOCAL_ADVICE = {
    "(os error 28)": FULL,
    "(os error 122)": FULL,
    "(os error 27)": f"File too large: {FULL}",
    "(os error 13)": "permission denied; see who owns it, or correct FINETUNE_STORE",
    "(os error 30)": "the file system is read-only",
}

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """An object as a listing tells of it.

    Attributes:
        key: Below the store's URL.
        size: Bytes.
        modified: When it was last written.
    """

    key: str
    size: int
    modified: datetime


def boto3_client() -> Any:
    """A client of S3 as the environment has it: AWS_* variables, profile, or the machine's role."""
    import boto3

    return boto3.Session().client("s3")


class Objects:
    """Objects by key below one URL. Nothing is connected to before it is used.

    Args:
        url: `file:///folder`, or `s3://bucket` or `s3://bucket/prefix`.
        connect: Gives the boto3 client whose endpoint and region are used.

    Raises:
        StoreError: if the URL is of no known form.
    """

    def __init__(self, url: str, connect: Callable[[], Any] = boto3_client) -> None:
        self.url = url.rstrip("/")
        self._connect = connect
        scheme, _, rest = self.url.partition("://")
        if "@" in rest and scheme != "file":
            raise StoreError(
                f"FINETUNE_STORE: credentials do not belong into a URL ({scheme}://...@{rest.rpartition('@')[2]}); "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        parts = urlsplit(self.url)
        self.is_local = scheme == "file" and rest.startswith("/")
        if not self.is_local and not (scheme == "s3" and parts.netloc and not parts.query and not parts.fragment):
            raise StoreError(
                f"FINETUNE_STORE: '{url}' is not a store; use file:///an/absolute/folder or s3://bucket/prefix"
            )
        self.path = rest if self.is_local else parts.path.strip("/")
        self.bucket = "" if self.is_local else parts.netloc

    @cached_property
    def backend(self) -> ObjectStore:
        if self.is_local:
            try:
                return LocalStore(self.path, mkdir=True)
            except (OSError, BaseError) as e:
                said = str(e).splitlines()[0]
                raise StoreError(f"FINETUNE_STORE: '{self.url}' cannot be used as a folder: {said}") from e
        environment = hash(tuple(sorted((name, os.environ[name]) for name in os.environ if name.startswith("AWS_"))))
        return _s3_store(self.bucket, self.path, self._connect, environment)

    def get(self, key: str) -> bytes:
        """An object's content.

        Raises:
            FileNotFoundError: if there is none.
        """
        self._refuse_link(key)
        return self.with_retries(key, lambda: bytes(obstore.get(self.backend, key).bytes()))

    def stream(self, key: str) -> Iterator[bytes]:
        """An object's content in pieces of some mebibytes. Errors are to be met by `with_retries` around the whole."""
        self._refuse_link(key)
        for chunk in obstore.get(self.backend, key).stream(min_chunk_size=CHUNK):
            yield memoryview(chunk)  # type: ignore[misc]

    def put(self, key: str, content: bytes) -> None:
        """Write a small object, over one that may be there."""
        self.with_retries(key, lambda: obstore.put(self.backend, key, content))

    def create(self, key: str, content: bytes) -> bool:
        """Write a small object if there is none; whether it is this content that lies there now."""

        def attempt() -> bool:
            try:
                obstore.put(self.backend, key, content, mode="create")
            except AlreadyExistsError:
                # The answer to an earlier try of ours may have been lost on the way
                return bytes(obstore.get(self.backend, key).bytes()) == content
            return True

        return self.with_retries(key, attempt)

    def upload(self, key: str, size: int, chunks: Callable[[], Iterator[bytes]]) -> None:
        """Write an object of any size, seen by nobody before it is whole.

        Args:
            key: Where.
            size: Bytes.
            chunks: Begins to read the content; called anew for each try.
        """
        part = max(PART, -(-size // MOST_PARTS))

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

    def listing(self, prefix: str = "") -> Iterator[Stored]:
        """All objects whose key begins with `prefix` (whole path segments)."""
        with self.explained(prefix):
            for batch in obstore.list(self.backend, prefix or None):
                for meta in batch:
                    yield Stored(meta["path"], meta["size"], meta["last_modified"])

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are passed over."""
        keys = list(keys)
        if keys:
            with self.explained(keys[0]):
                try:
                    obstore.delete(self.backend, keys)
                except FileNotFoundError as e:
                    if _code(e) == "NoSuchBucket":
                        raise
                    for key in keys:
                        _delete_if_there(self.backend, key)
        if self.is_local:
            _remove_empty_folders(Path(self.path), keys)

    def abort_uploads(self, prefix: str, before: datetime, dry_run: bool) -> list[str]:
        """Uploads that some process began under `prefix` before a moment and never ended; removed unless `dry_run`."""
        found = self._local_uploads(prefix) if self.is_local else self._s3_uploads(prefix)
        old = [(key, end) for key, began, end in found if began < before]
        for _, end in old:
            if not dry_run:
                end()
        return [key for key, _ in old]

    def _s3_uploads(self, prefix: str) -> Iterator[tuple[str, datetime, Callable[[], Any]]]:
        from botocore.exceptions import BotoCoreError, ClientError

        client, root = self._connect(), f"{self.path}/" if self.path else ""
        try:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=root + prefix)
            for upload in (upload for page in pages for upload in page.get("Uploads", ())):
                which = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                end = lambda which=which: client.abort_multipart_upload(**which)  # noqa: E731
                yield upload["Key"].removeprefix(root), upload["Initiated"], end
        except (ClientError, BotoCoreError) as e:
            raise StoreError(f"{self.url}: unfinished uploads cannot be listed ({e})") from e

    def _local_uploads(self, prefix: str) -> Iterator[tuple[str, datetime, Callable[[], Any]]]:
        root = Path(self.path)
        for staged in (root / prefix).rglob("*#*"):  # how obstore names what it has not renamed yet
            if staged.is_file() and re.search(r"#\d+$", staged.name):
                began = datetime.fromtimestamp(staged.stat().st_mtime).astimezone()
                yield staged.relative_to(root).as_posix(), began, staged.unlink

    def with_retries(self, key: str, attempt: Callable[[], T]) -> T:
        """Do something, again where that can help, and tell plainly what is wrong where it cannot.

        Raises:
            FileNotFoundError: if the object is not there.
            StoreError: naming the store, the key and what to do.
        """
        with self.explained(key):
            for left in reversed(range(1 if self.is_local else TRIES)):
                try:
                    return attempt()
                except BaseError as e:
                    if left == 0 or _code(e) in ADVICE:
                        raise
                    logger.warning("%s/%s: %s; trying again", self.url, key, _said(e))
                    time.sleep(PAUSE_SECONDS)
                except FileNotFoundError as e:
                    # An upload whose end was answered by silence is ended twice, and not found the second time
                    if left == 0 or _code(e) != "NoSuchUpload":
                        raise
        raise AssertionError("unreachable")

    @contextmanager
    def explained(self, key: str) -> Iterator[None]:
        """Turn what a store can answer instead into one line that says what to do; a missing object stays one."""
        where = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except FileNotFoundError as e:
            if _code(e) == "NoSuchBucket":
                raise StoreError(f"{self.url}: {ADVICE['NoSuchBucket']}") from e
            raise
        except BaseError as e:
            advice = ADVICE.get(_code(e)) or next((told for sign, told in LOCAL_ADVICE.items() if sign in str(e)), None)
            raise StoreError(f"{where}: {advice or f'{_said(e)}; try again later'} ({_code(e) or _kind(e)})") from e

    def _refuse_link(self, key: str) -> None:
        """A link in a folder store could lead a reader anywhere."""
        if self.is_local:
            path = Path(self.path) / key
            if path.resolve() != Path(self.path).resolve() / key:
                raise StoreError(f"{self.url}/{key}: refused, a link instead of a file; remove it")


class _Source:
    """An iterator that keeps the error which ended it: obstore tells of its own only."""

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
    """One connection pool a process; another where the environment says something else (`environment` is its hash)."""
    import boto3
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    try:
        meta = connect().meta
        provider = Boto3CredentialProvider(boto3.Session(), ttl=CREDENTIALS_LIVE)
    except (BotoCoreError, ValueError) as e:
        reason = f"{e}; " if isinstance(e, BotoCoreError) else ""
        raise StoreError(
            f"FINETUNE_STORE: s3://{bucket}: no credentials; {reason}set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or give this machine a role"
        ) from e
    region = meta.region_name if meta.region_name not in (None, "aws-global") else "us-east-1"
    bundle = os.environ.get("AWS_CA_BUNDLE")
    trust = {"root_certificate": Path(bundle).read_bytes()} if bundle else {}
    plain = meta.endpoint_url.startswith("http://")
    return S3Store(
        bucket,
        prefix=prefix or None,
        # obstore lets AWS_ENDPOINT_URL_S3 win over `endpoint`, but not over the setting of that name
        config={"aws_endpoint_url_s3": meta.endpoint_url, "region": region},
        client_options={**TIMEOUTS, **trust, "allow_http": plain},
        retry_config=RETRIES,
        credential_provider=provider,
    )


def _delete_if_there(backend: ObjectStore, key: str) -> None:
    with suppress(FileNotFoundError):
        obstore.delete(backend, key)


def _remove_empty_folders(root: Path, keys: Iterable[str]) -> None:
    for folder in sorted({parent for key in keys for parent in (root / key).parents}, reverse=True):
        if folder != root and folder.is_relative_to(root):
            with suppress(OSError):
                folder.rmdir()


def _code(error: Exception) -> str:
    """S3's own name for what is wrong."""
    if found := re.search(r"<Code>(\w+)</Code>", str(error)):
        return found[1]
    return "PermanentRedirect" if "redirect without LOCATION" in str(error) else ""


def _kind(error: Exception) -> str:
    status = re.search(r"status code: (\d+ [\w ]+)", str(error))
    return status[1] if status else type(error).__name__


def _said(error: Exception) -> str:
    """The first sentence of an error, without the request that it repeats."""
    line = re.sub(r"^(Generic \w+ error: )+", "", str(error).splitlines()[0])
    line = re.sub(r"Error performing (\w+) \S+ in [\w.µ]+(, after \d+ retries[^-]*)? +- ", r"\1: ", line)
    line = re.sub(r": <\?xml.*", "", line)
    return "the server cannot be reached; see AWS_ENDPOINT_URL_S3" if "error sending request" in line else line
