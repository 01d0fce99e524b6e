"""Refuses rows of other objectives than supervised fine-tuning, and of formats that are no rows of text."""

from collections.abc import Mapping
from typing import Any

from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.values import is_empty, shortened

PREFERENCES = ("chosen", "rejected", "chosen_response", "rejected_response", "rejected_responses")
LABELS = ("label", "kto_tag")
TREES = ("message_tree_id", "parent_id", "replies")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
MARKS = frozenset((*PREFERENCES, *LABELS, *TREES, *MEDIA))
"""Keys by which such rows are recognized."""


def refuse_other_objectives(row: Mapping[str, Any]) -> None:
    """Check a row that has one of the keys `MARKS`.

    Raises:
        BadRow: naming the keys, the objective or format, and what to do.
    """
    instead = "or list the columns to pass over in raw_data.yaml: columns.ignore"
    if pair := [key for key in PREFERENCES if not is_empty(row.get(key))]:
        raise BadRow(
            f"{_quoted(pair)}: a preference pair, for an objective such as DPO; for supervised fine-tuning write the "
            f"chosen answer as 'response', {instead}"
        )
    for key in LABELS:
        if isinstance(row.get(key), bool) or str(row.get(key)).lower() in ("true", "false"):
            raise BadRow(
                f"'{key}' is {shortened(row[key])}: a labelled answer, for an objective such as KTO; for supervised "
                f"fine-tuning keep the rows labelled true without '{key}', {instead}"
            )
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
