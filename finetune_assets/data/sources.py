"""Where raw data comes from: the packaged sample, files of this machine, or a Hub dataset at a commit."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from finetune_assets import hub
from finetune_assets.config.schema import HubDataset, RawDataConfig
from finetune_assets.data.errors import DataError
from finetune_assets.data.readers import READERS
from finetune_assets.hashing import sha256

SAMPLE = Path(__file__).parent.parent / "sample" / "dolly_sample.jsonl"
HUB = "hf://"
HUB_DATASET = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+|[^/@]+)(@(?P<revision>[^@]+))?/?")
ENDINGS = ", ".join(READERS)


@dataclass(frozen=True)
class SourceFile:
    """A file of rows.

    Attributes:
        name: Relative to the source, the same on every machine.
        path: Where it lies here.
    """

    name: str
    path: Path


class Source(Protocol):
    """One version of the raw data."""

    def content(self) -> Any:
        """Plain data that pins every byte; asked anew each time, so a change while reading is seen."""

    def files(self) -> Sequence[SourceFile]:
        """The files, in reading order, on this machine."""


@dataclass(frozen=True)
class LocalSource:
    """Files of this machine."""

    found: Sequence[SourceFile]

    def content(self) -> Any:
        return [[file.path.suffix.lower(), _content_of(file.path)] for file in self.found]

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


ASK_HUB = partial(hub.commit_of, repo_type="dataset")


def open_source(config: RawDataConfig, root: Path, commit_of: Callable[[str, str], str] = ASK_HUB) -> Source:
    """What `source` means.

    Args:
        config: The raw data's settings.
        root: What a relative path is relative to.
        commit_of: Says which commit a revision of a Hub dataset is.

    Raises:
        DataError: if there is nothing to read there.
    """
    if config.source == "sample":
        return LocalSource([SourceFile(SAMPLE.name, SAMPLE)])
    if config.source.startswith(HUB):
        return _hub_source(config, commit_of)
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
            "name a file, a folder, hf://datasets/owner/name, or 'sample'"
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
