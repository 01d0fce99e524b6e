"""What a source of raw data is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from finetune_assets.config.raw_data_schema import RawDataConfig
from finetune_assets.data.readers import ROW_FORMATS, Formats, SourceFile
from finetune_assets.sources import hub

COMMIT_OF = partial(hub.commit_of, repo_type="dataset")


class Source(Protocol):
    """One version of the raw data.

    Attributes:
        is_pinned: Whether this version can never change, such as a commit; otherwise the source is opened again after
            reading, to detect changes during the read.
    """

    is_pinned: bool

    def content(self) -> Any:
        """Plain data that identifies every byte; computed on every call, so a change during reading is detected."""

    def peek(self) -> Any:
        """Plain data that changes whenever the content may have changed; reads metadata only."""

    def cached_content(self) -> Any:
        """Like `content`, but files with unchanged metadata since this process read them are not read again."""

    def files(self) -> Sequence[SourceFile]:
        """The files, in reading order, on this machine.

        Raises:
            DataError: if a file cannot be read, naming the setting, the file and what to do.
        """

    def ignored_files(self) -> Sequence[str]:
        """Names of the source's other files, which are not read; hidden files are excluded."""


@dataclass(frozen=True)
class SourceContext:
    """What a source is opened with.

    Attributes:
        config: Raw data settings.
        root: Folder that relative paths start from.
        commit_of: Returns the commit of a Hub dataset's revision.
        connect: Creates the boto3 client; None where S3 is not available.
        downloads: Folder for downloaded files; None where nothing may be downloaded.
        formats: File formats that are read.
        setting: Where `source` is set, for messages.
    """

    config: RawDataConfig
    root: Path
    commit_of: Callable[[str, str], str] = COMMIT_OF
    connect: Callable[[], Any] | None = None
    downloads: Path | None = None
    formats: Formats = ROW_FORMATS
    setting: str = "`source` in raw_data.yaml, or FINETUNE_RAW_DATA,"
