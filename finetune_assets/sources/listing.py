"""Separates a source's files of rows from its other files, by name."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers import ROW_FORMATS, Formats

SAVED_DATASET = ({"state.json", "dataset_info.json"}, {"dataset_dict.json"})
"""Files of a folder that `datasets` wrote with `save_to_disk`; each set is a mark of its own."""


@dataclass(frozen=True)
class Listing:
    """Names of a source's files, relative to it.

    Attributes:
        rows: Files that are read.
        ignored: Other files. Hidden files are in neither, because they may be partial downloads.
    """

    rows: list[str]
    ignored: list[str]


def list_names(names: Iterable[str], where: str, formats: Formats = ROW_FORMATS) -> Listing:
    """Separate the names of files, in the given order.

    Args:
        names: Names relative to the source, with `/`.
        where: The source, for messages.
        formats: File formats that are read.

    Raises:
        DataError: if a folder was written by `save_to_disk`: which of its rows count, and in which order, is not
            visible in its Arrow files alone.
    """
    shown = [name for name in names if not is_hidden(name)]
    refuse_saved_dataset(shown, where)
    rows = [name for name in shown if formats.suffix_of(name)]
    return Listing(rows, [name for name in shown if not formats.suffix_of(name)])


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def refuse_saved_dataset(names: Iterable[str], where: str) -> None:
    """Raise `DataError` if one of the folders was written by `save_to_disk`."""
    folders: dict[PurePosixPath, set[str]] = {}
    for name in map(PurePosixPath, names):
        folders.setdefault(name.parent, set()).add(name.name)
    for folder, files in folders.items():
        if any(mark <= files for mark in SAVED_DATASET):
            raise DataError(
                f"{where}: the folder '{folder}' was written by save_to_disk of `datasets`, and is not a format for "
                "exchange; export it: datasets.load_from_disk(FOLDER)['train'].to_json('rows.jsonl'), without "
                "['train'] for a single split"
            )
