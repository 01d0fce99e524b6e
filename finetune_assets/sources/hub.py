"""The Hugging Face Hub: its real client, downloads that are checked, and what to do about each of its refusals."""

import hashlib
import io
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

from finetune_assets.errors import UserError
from finetune_assets.progress import Progress
from finetune_assets.store.hashing import sha256

COMMIT = re.compile(r"[0-9a-f]{40}")
RepoType = Literal["model", "dataset"]


class DamagedDownload(UserError):
    """A file that is not what the Hub says that it is, downloaded twice."""


def client() -> HfApi:
    """The Hub's real client. HF_ENDPOINT and HF_TOKEN are read anew, so a daemon need not be restarted for them."""
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN") or None)


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit, which always means the same."""
    return bool(COMMIT.fullmatch(revision))


def commit_of(repo: str, revision: str, repo_type: RepoType) -> str:
    """The commit that a branch, tag or commit means right now; a whole commit is taken as it is, without asking."""
    if is_commit(revision):
        return revision
    return client().repo_info(repo, revision=revision, repo_type=repo_type).sha or revision


def files_of(repo: str, commit: str, repo_type: RepoType) -> dict[str, RepoFile]:
    """Every file of a commit by its path, with size and hash."""
    tree = client().list_repo_tree(repo, recursive=True, revision=commit, repo_type=repo_type)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def download(repo: str, commit: str, files: Sequence[RepoFile], repo_type: RepoType) -> Path:
    """Fetch files of a commit into the client's own cache, where a cut download goes on, and check each.

    Returns:
        The folder of this commit in the cache.

    Raises:
        DamagedDownload: if a file's size or hash is not the Hub's, even after it was downloaded anew. The client alone
            notices neither in what it cached before.
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
                raise DamagedDownload(f"{repo} at {commit}: {file.path} arrives damaged (size or hash); try later")
    return folder


def _bars(progress: Progress) -> type[tqdm]:
    """Bars that count the client's bytes and draw nothing. It has one of what comes, and one of what is written."""

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "mininterval": 3600})

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self.unit == "B":
                progress.reach(int(self.n))

    return Bar


def is_down(error: BaseException | None) -> bool:
    """Whether the Hub, rather than what it was asked for, is why it did not answer."""
    if isinstance(error, HfHubHTTPError):
        unasked = isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, DisabledRepoError))
        return not unasked and (error.response.status_code == 429 or error.response.status_code >= 500)
    return isinstance(error, (OfflineModeIsEnabled, HTTPError, ConnectionError, TimeoutError))


def _is_whole(path: Path, file: RepoFile) -> bool:
    """Compare with the Hub's sha256 for a large file, and with git's hash of a blob for a small one."""
    if path.stat().st_size != file.size:
        return False
    if file.lfs:
        return sha256(path) == file.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest() == file.blob_id


@contextmanager
def explained(error: type[UserError], where: str, page: str, otherwise: str) -> Iterator[None]:
    """Turn everything that the Hub can answer instead of a repository into one line that says what to do.

    Args:
        error: What to raise.
        where: The setting, repository and revision.
        page: The repository's path on the Hub's site.
        otherwise: What can be named instead of a Hub repository.
    """
    try:
        yield
    except GatedRepoError as e:  # a subclass of RepositoryNotFoundError, so it comes first
        raise error(
            f"{where}: gated. Accept its licence at {client().endpoint}/{page} with your account, and set HF_TOKEN"
        ) from e
    except RevisionNotFoundError as e:
        raise error(f"{where}: the repository has no such branch, tag or commit; see the revision") from e
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
                "some, or set HF_HOME to a folder on a larger disk"
            ) from e
        raise error(f"{where}: the Hub at {client().endpoint} cannot be reached ({e}); try again. {otherwise}") from e


def _refusal(answer: HfHubHTTPError) -> str:
    status = answer.response.status_code
    if status == 429:
        return "the Hub asks to slow down (429); wait some minutes, or set HF_TOKEN, which allows for more"
    if status == 401:
        return "the Hub does not accept HF_TOKEN (401); set a valid one, or none"
    return f"the Hub refused ({status}); try again later"
