"""Hugging Face Hub access: verified downloads, and error messages with a remedy."""

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from finetune_assets.display import PlainRecords, shown_url
from finetune_assets.errors import UserError
from finetune_assets.progress import Progress
from finetune_assets.store.hashing import sha256

for _handler in logging.getLogger("huggingface_hub").handlers:
    _handler.addFilter(PlainRecords(lines=True))  # the client's warnings name the URLs of requests
COMMIT = re.compile(r"[0-9a-f]{40}")
RepoType = Literal["model", "dataset"]


class DamagedDownload(UserError):
    """A file with another size or hash than on the Hub, even after a second download."""


def client() -> HfApi:
    """The Hub client. HF_ENDPOINT and HF_TOKEN are read on every call, so changes need no restart of a daemon."""
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN") or None)


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, which never changes its meaning."""
    return bool(COMMIT.fullmatch(revision))


def commit_of(repo: str, revision: str, repo_type: RepoType) -> str:
    """The current commit of a branch, tag or commit; a full commit hash is returned without a request."""
    if is_commit(revision):
        return revision
    return client().repo_info(repo, revision=revision, repo_type=repo_type).sha or revision


def files_of(repo: str, commit: str, repo_type: RepoType) -> dict[str, RepoFile]:
    """All files of a commit by path, with size and hash."""
    tree = client().list_repo_tree(repo, recursive=True, revision=commit, repo_type=repo_type)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def download(repo: str, commit: str, files: Sequence[RepoFile], repo_type: RepoType) -> Path:
    """Download files of a commit to the client's cache, where an interrupted download resumes, and verify each file.

    Returns:
        The folder of this commit in the cache.

    Raises:
        DamagedDownload: if a file's size or hash differs from the Hub's even after a second download. The client itself
            does not verify files that are already in its cache.
    """
    hub, names = client(), [file.path for file in files]
    with Progress(f"downloading {repo} from the Hub", sum(file.size for file in files)) as progress:
        bars = _bars(progress)
        folder = Path(
            hub.snapshot_download(repo, revision=commit, allow_patterns=names, repo_type=repo_type, tqdm_class=bars)
        )
    for file in files:
        if not _is_whole(folder / file.path, file):
            hub.hf_hub_download(repo, file.path, revision=commit, repo_type=repo_type, force_download=True)
            if not _is_whole(folder / file.path, file):
                raise DamagedDownload(f"{repo} at {commit}: {file.path} is damaged (size or hash); try again later")
    return folder


def _bars(progress: Progress) -> type[tqdm]:
    """A bar class that counts the client's bytes and draws nothing; the client has one bar each for received and
    written bytes."""

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "mininterval": 3600})

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self.unit == "B":
                progress.reach(int(self.n))

    return Bar


def is_down(error: BaseException | None) -> bool:
    """Whether a request failed because of the Hub itself, not because of the requested repository or revision."""
    if isinstance(error, HfHubHTTPError):
        unavailable = isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, DisabledRepoError))
        return not unavailable and (error.response.status_code == 429 or error.response.status_code >= 500)
    return isinstance(error, (OfflineModeIsEnabled, HTTPError, ConnectionError, TimeoutError))


def _is_whole(path: Path, file: RepoFile) -> bool:
    """Compare size and hash with the Hub's: sha256 for a large file, git's blob hash for a small one."""
    if path.stat().st_size != file.size:
        return False
    if file.lfs:
        return sha256(path) == file.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest() == file.blob_id


@contextmanager
def explained(error: type[UserError], where: str, page: str, otherwise: str) -> Iterator[None]:
    """Convert the Hub client's exceptions to one-line errors with a remedy.

    Args:
        error: Exception class to raise.
        where: Setting, repository and revision, for the message.
        page: Path of the repository on the Hub's site.
        otherwise: Alternative to a Hub repository, for the message.
    """
    try:
        yield
    except GatedRepoError as e:  # a subclass of RepositoryNotFoundError, so it comes first
        raise error(
            f"{where}: gated. Accept its licence at {shown_url(client().endpoint)}/{page} with your account, and set "
            "HF_TOKEN"
        ) from e
    except RevisionNotFoundError as e:
        raise error(f"{where}: the repository has no such branch, tag or commit; check the revision") from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        token = "HF_TOKEN is not valid or may not read it" if client().token else "set HF_TOKEN"
        raise error(f"{where}: not on the Hub, or private ({token}). {otherwise}") from e
    except DisabledRepoError as e:
        raise error(f"{where}: the Hub has disabled this repository. {otherwise}") from e
    except OfflineModeIsEnabled as e:
        raise error(f"{where}: Hub access is disabled by HF_HUB_OFFLINE; unset it. {otherwise}") from e
    except HfHubHTTPError as e:
        raise error(f"{where}: {_refusal(e)}") from e
    except (OSError, HTTPError) as e:
        if isinstance(e, OSError) and e.errno in (ENOSPC, EDQUOT):
            raise error(
                f"{where}: no space left for the download in the Hub client's cache ({e.filename or 'HF_HOME'}); free "
                "space, or set HF_HOME to a folder on a larger disk"
            ) from e
        raise error(
            f"{where}: the Hub at {shown_url(client().endpoint)} cannot be reached ({e}); try again. {otherwise}"
        ) from e


def _refusal(answer: HfHubHTTPError) -> str:
    status = answer.response.status_code
    if status == 429:
        return "the Hub's rate limit is exceeded (429); wait a few minutes, or set HF_TOKEN for a higher limit"
    if status == 401:
        return "the Hub does not accept HF_TOKEN (401); set a valid one, or none"
    return f"the Hub returned an error ({status}); try again later"
