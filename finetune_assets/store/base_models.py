"""Where a base model comes from: the package, a local folder, or the Hub at a pinned commit."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from finetune_assets.config.errors import suggest
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import sha256

PACKAGED = {"demo-base": Path(__file__).parent.parent / "sample" / "base_model"}
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.*",
)
WANTED_FILES = (*TOKENIZER_FILES, "generation_config.json", "*.safetensors", "*.safetensors.index.json")
COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class BaseModelError(UserError):
    """A base model that cannot be had, or not be used."""


@dataclass(frozen=True)
class BaseModelSource:
    """One version of a base model.

    Attributes:
        repo: `owner/name` on the Hub; `packaged/...` or `local/...` otherwise.
        revision: The commit; for a folder, a hash of its content.
        folder: Where its files lie on this machine; None for the Hub.
    """

    repo: str
    revision: str
    folder: Path | None = None


def is_tokenizer_file(path: str) -> bool:
    """Whether the tokenizer is read from this file (config.json may name its class)."""
    return _matches(path, TOKENIZER_FILES)


def locate(base_model: str, revision: str, root: Path) -> BaseModelSource:
    """Pin what `model.base_model` and `model.revision` mean right now.

    Args:
        base_model: A packaged name, a folder (`./path`, `/path`, `~/path`), or a Hub id.
        revision: Branch, tag or commit on the Hub.
        root: What a relative folder is relative to.

    Raises:
        BaseModelError: if there is no such model, or the Hub does not answer.
    """
    if base_model in PACKAGED:
        return _pin_folder(f"packaged/{base_model}", PACKAGED[base_model])
    if base_model.startswith((".", "/", "~")):
        folder = (root / Path(base_model).expanduser()).resolve()
        if not folder.is_dir():
            raise BaseModelError(f"model.base_model: folder {folder} does not exist")
        return _pin_folder(f"local/{folder.name}", folder)
    if COMMIT.fullmatch(revision):
        return BaseModelSource(base_model, revision)  # so what the store has is used with the Hub down
    with _hub_errors(base_model, revision):
        return BaseModelSource(base_model, _hub().model_info(base_model, revision=revision).sha)


def collect(source: BaseModelSource, target: Path) -> None:
    """Copy the files that training needs into `target`: safetensors, configuration, tokenizer.

    Raises:
        BaseModelError: if they are not there, or the weights are pickled.
    """
    folder = source.folder
    if folder is None:
        with _hub_errors(source.repo, source.revision):
            hub, at = _hub(), source.revision
            _check_files(
                [name for name in hub.list_repo_files(source.repo, revision=at) if "/" not in name], source.repo
            )
            folder = Path(
                hub.snapshot_download(source.repo, revision=at, allow_patterns=[*WANTED_FILES], ignore_patterns=["*/*"])
            )
    for path in _wanted_files(folder):
        shutil.copyfile(path, target / path.name)
        if path.suffix == ".safetensors":
            _check_weights(target / path.name, source.repo)


def _check_weights(path: Path, repo: str) -> None:
    """Read a weights file's header, which says how long the file must be."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as e:
        raise BaseModelError(f"{repo}: {path.name} is damaged ({e}); download or save the model again") from e


def _hub() -> HfApi:
    """The Hub's real client. HF_ENDPOINT and HF_TOKEN are read anew, so a daemon need not be restarted for them."""
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN") or None)


def _pin_folder(repo: str, folder: Path) -> BaseModelSource:
    _check_files([path.name for path in folder.iterdir()], str(folder))
    content = {path.name: sha256(path) for path in _wanted_files(folder)}
    return BaseModelSource(repo, fingerprint(files=content)[:40], folder)


def _wanted_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and _matches(path.name, WANTED_FILES))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_files(names: list[str], where: str) -> None:
    if "config.json" not in names:
        raise BaseModelError(f"{where}: no config.json, so this is not a transformers model")
    if not any(_matches(name, ("*.safetensors",)) for name in names):
        pickled = next((name for name in names if _matches(name, PICKLES)), None)
        found = f"only pickled weights ({pickled}), which can run code when they are read" if pickled else "no weights"
        raise BaseModelError(
            f"{where}: {found}; take a revision or repository with .safetensors, or convert a folder with "
            "transformers' save_pretrained"
        )
    if not any(_matches(name, ("tokenizer.json", "*.model", "vocab.*")) for name in names):
        raise BaseModelError(f"{where}: no tokenizer (tokenizer.json); save it into the same folder")


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    """Say what to do about everything that the Hub can answer instead of a model."""
    where = f"model.base_model: '{repo}' at '{revision}'"
    try:
        yield
    except GatedRepoError as e:  # a subclass of RepositoryNotFoundError, so it comes first
        raise BaseModelError(
            f"{where}: gated. Accept its licence at {_hub().endpoint}/{repo} with your account, and set HF_TOKEN"
        ) from e
    except RevisionNotFoundError as e:
        raise BaseModelError(f"{where}: the repository has no such branch, tag or commit; see model.revision") from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise BaseModelError(
            f"{where}: not on the Hub, or private (set HF_TOKEN). For a folder write ./{repo}; packaged: "
            f"{suggest(repo, PACKAGED)}"
        ) from e
    except OfflineModeIsEnabled as e:
        raise BaseModelError(
            f"{where}: not packaged ({suggest(repo, PACKAGED)}), and HF_HUB_OFFLINE "
            "forbids to ask the Hub; unset it, or name a folder or packaged model"
        ) from e
    except HfHubHTTPError as e:
        raise BaseModelError(f"{where}: the Hub refused ({e.response.status_code}); try again later") from e
    except (OSError, HTTPError) as e:
        raise BaseModelError(
            f"{where}: the Hub at {_hub().endpoint} cannot be reached ({e}); try again, or name a "
            f"folder (./...) or a packaged model: {suggest(repo, PACKAGED)}"
        ) from e
