"""What a layout of rows is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetune_assets.data.layouts.values import Values
from finetune_assets.data.rows import Row


@dataclass(frozen=True)
class Layout:
    """A layout of rows in the source.

    Attributes:
        marker: A row with a value in this column has this layout.
        columns: Accepted names of each of its columns; `category` and `system` are columns of every layout.
        read: Converts a row to a row of `RAW_SCHEMA`, given its values, category and system prompt. Raises `BadRow`
            with the reason if the row is invalid.
    """

    marker: str
    columns: Mapping[str, tuple[str, ...]]
    read: Callable[[Values, str, str], Row]
