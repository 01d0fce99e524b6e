"""Refuses rows of formats that are no rows of text: messages of a tree, images, audio and video."""

from collections.abc import Mapping
from typing import Any

from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.values import is_empty

TREES = ("message_tree_id", "parent_id", "replies")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
MARKS = frozenset((*TREES, *MEDIA))
"""Keys by which such rows are recognized."""


def refuse_other_formats(row: Mapping[str, Any]) -> None:
    """Check a row that has one of the keys `MARKS`.

    Raises:
        BadRow: naming the keys, the format, and what to do.
    """
    instead = "or list the columns to pass over in raw_data.yaml: columns.ignore"
    tree = [key for key in TREES if key in row]
    if "message_tree_id" in tree or (tree and "text" in row):
        raise BadRow(
            f"{_quoted(tree)}: a message of a tree, as in OpenAssistant's OASST; write each path from the first "
            'message to an answer as a row {"messages": [{"role": "user", "content": "..."}, ...]}'
        )
    if media := [key for key in MEDIA if not is_empty(row.get(key))]:
        raise BadRow(f"{_quoted(media)} would be lost; only text is supported; remove the row, {instead}")


def _quoted(keys: list[str]) -> str:
    return " and ".join(f"'{key}'" for key in keys)
