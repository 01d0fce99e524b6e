"""The registry of row layouts. A layout of your own is a file in this folder and an entry in LAYOUTS.

No content is dropped silently: a row with a key that resembles a known one, or with a turn that contains more than
text, is a bad row.
"""

from collections.abc import Callable
from dataclasses import asdict
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.conversation import CONVERSATION
from finetune_assets.data.layouts.instruction import INSTRUCTION
from finetune_assets.data.layouts.layout import Layout
from finetune_assets.data.layouts.values import Values, shortened
from finetune_assets.data.rows import Row

LAYOUTS: tuple[Layout, ...] = (
    CONVERSATION,
    INSTRUCTION,
)
"""Layouts in the order in which they are tried; the last is that of rows without any marker. Raise the code version of
`RAW` in artifacts/kinds.py with each change, so that raw data is read again."""
COMMON = {"category": ("category",), "system": ("system",)}
"""Columns of every layout."""


def row_reader(columns: Columns) -> Callable[[dict[str, Any]], Row]:
    """Create the function that converts a row of the source to a row of `RAW_SCHEMA`.

    Args:
        columns: Column names of the source.

    Returns:
        A function that raises `BadRow` with the reason if a row is invalid.
    """
    given = {name: (theirs,) for name, theirs in asdict(columns).items() if theirs is not None}
    names = {name: known for layout in LAYOUTS for name, known in layout.columns.items()} | COMMON | given

    @lru_cache(maxsize=1_000)
    def lookalikes(keys: tuple[str, ...]) -> list[tuple[str, str]]:
        """Unknown keys, each with the known key that it resembles."""
        known = [name for group in names.values() for name in group]
        near = ((key, get_close_matches(key, known, 1, 0.75)) for key in keys if key not in known)
        return [(key, matches[0]) for key, matches in near if matches]

    def read(row: dict[str, Any]) -> Row:
        if not isinstance(row, dict):
            raise BadRow(f"expected a JSON object, found {shortened(row)}")
        for key, meant in lookalikes(tuple(row)):
            if row[key] and not row.get(meant):
                raise BadRow(f"unknown key '{key}' would be lost; did you mean '{meant}'?")
        values = Values(row, names)
        system, category = values.text("system"), values.text("category", numbers=True)
        layout = next((layout for layout in LAYOUTS if values.pick(layout.marker)), LAYOUTS[-1])
        return layout.read(values, category, system)

    return read
