"""Raw data from a dataset of the Hub."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune_assets.config.raw_data_schema import HubDataset
from finetune_assets.data.errors import DataError
from finetune_assets.data.readers import ROW_FORMATS, TEXT_ENDINGS, Formats, SourceFile
from finetune_assets.sources import hub
from finetune_assets.sources.listing import is_hidden, refuse_saved_dataset
from finetune_assets.sources.source import SourceContext

HUB, CARD = "hf://", "README.md"
HUB_DATASET = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+|[^/@]+)(@(?P<revision>[^@]+))?/?")


@dataclass(frozen=True)
class HubSource:
    """A Hub dataset at a commit.

    Its files are read by the same readers as local files, so that a bad row is reported with file and line; the
    `datasets` library determines the files of a subset and split. It knows no Markdown: of a repository that has texts
    and no rows, all texts are read, where texts are documents.
    """

    repo: str
    commit: str
    part: HubDataset
    formats: Formats = ROW_FORMATS
    is_pinned = True

    def content(self) -> Any:
        return {"repo": self.repo, "commit": self.commit, "subset": self.part.subset, "split": self.part.split}

    def peek(self) -> Any:
        return self.content()

    def cached_content(self) -> Any:
        return self.content()

    def files(self) -> Sequence[SourceFile]:
        """Download the files.

        Raises:
            DataError: if a download fails, the subset or split does not exist, or a file format is not supported.
        """
        with hub.explained(DataError, self._where, f"datasets/{self.repo}", "Or name a file or folder"):
            # Called before `datasets`, which has less specific error messages
            tree = self._tree
            refuse_saved_dataset(tree, self._where)
            names = self._names
            if unknown := next((name for name in names if not self.formats.suffix_of(name)), None):
                raise DataError(f"{self._where}: {unknown} has an unsupported format; supported: {self.formats.shown}")
            folder = hub.download(self.repo, self.commit, [tree[name] for name in names], "dataset")
            return [SourceFile(name, folder / name) for name in names]

    def ignored_files(self) -> Sequence[str]:
        """Other files of the repository."""
        return [name for name in self._tree if name not in self._names and not is_hidden(name)]

    @cached_property
    def _tree(self) -> dict[str, Any]:
        return hub.files_of(self.repo, self.commit, "dataset")

    @property
    def _where(self) -> str:
        return f"source: '{HUB}datasets/{self.repo}' at '{self.commit}'"

    @cached_property
    def _names(self) -> list[str]:
        """Names of the files to read."""
        return self._texts or self._of_split()

    @property
    def _texts(self) -> list[str]:
        """Names of all text files but the dataset's card; empty if other formats, a subset or a split are read."""
        found = {name: self.formats.suffix_of(name) for name in self._tree if not is_hidden(name) and name != CARD}
        only_texts = TEXT_ENDINGS.issuperset(ending for ending in found.values() if ending)
        return sorted(name for name in found if found[name]) if only_texts and self.part == HubDataset() else []

    def _of_split(self) -> list[str]:
        """Names of the split's files."""
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
            raise DataError(f"{self._where}: {elsewhere} is not part of this commit")
        return [file.removeprefix(prefix) for file in files]


def open_hub_dataset(context: SourceContext) -> HubSource:
    """A dataset at the commit of its revision.

    Raises:
        DataError: if the URL is invalid, or the Hub does not give the commit.
    """
    config = context.config
    match = HUB_DATASET.fullmatch(config.source)
    if not match:
        raise DataError(
            f"source: '{config.source}' must be hf://datasets/owner/name, or hf://datasets/owner/name@revision"
        )
    repo, revision = match["repo"], match["revision"] or "main"
    where = f"source: '{config.source}'"
    with hub.explained(DataError, where, f"datasets/{repo}", "Or name a file or folder"):
        return HubSource(repo, context.commit_of(repo, revision), config.hub, context.formats)
