"""Values of a row in the source, and the rows of `RAW_SCHEMA` that layouts create from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from finetune_assets.data.errors import BadRow
from finetune_assets.data.rows import Row, Turn
from finetune_assets.data.sensitive import masked

MOST_KEYS, MOST_SHOWN = 100, 10_000
"""Keys of a row, and characters of a value, that are searched for secrets before the first of them are shown."""


@dataclass(frozen=True)
class Values:
    """A row of the source.

    Attributes:
        row: The row.
        names: Accepted names of each column.
    """

    row: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]]

    def pick(self, column: str) -> Any:
        """The value of whichever of the column's names has one.

        Raises:
            BadRow: if two of them have different values.
        """
        name, value = self.find(column)
        if name is not None:
            return value
        names = self.names.get(column, ())
        value = self.row.get(names[0]) if names else None
        return None if value != value else value

    def find(self, column: str) -> tuple[str | None, Any]:
        """Whichever of the column's names has a value, with the value; None twice if none has.

        Raises:
            BadRow: if two of them have different values.
        """
        names = self.names.get(column, ())
        if len(names) == 1:
            value = self.row.get(names[0])
            return (None, None) if is_empty(value) else (names[0], value)
        values = [(name, self.row.get(name)) for name in names]
        values = [(name, value) for name, value in values if not is_empty(value)]
        if other := next((name for name, value in values if value != values[0][1]), None):
            raise BadRow(
                f"'{values[0][0]}' and '{other}' both have a value, and one would be lost; choose one in "
                f"raw_data.yaml: columns.{column}"
            )
        return values[0] if values else (None, None)

    def text(self, column: str, required: bool = False, numbers: bool = False) -> str:
        """The text of a column; empty if it has none.

        Args:
            column: The column.
            required: Refuse a row without it.
            numbers: Accept a number as text.

        Raises:
            BadRow: if it is not text, or is missing or blank and required.
        """
        names, value = self.names.get(column) or (column,), self.pick(column)
        if value is None and required and not any(key in self.row for key in names):
            keys = masked(", ".join(map(str, islice(self.row, MOST_KEYS)))[:MOST_SHOWN])[:200] or "no keys"
            objects = next((key for key, value in self.row.items() if _holds_objects(value)), "")
            rows = f"; if '{objects}' holds the rows, write that array alone" if objects else ""
            raise BadRow(
                f"'{names[0]}' is missing; found {keys} (name the source's columns in raw_data.yaml: columns{rows})"
            )
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(int(value)) if value == value // 1 else str(value)
        value = "" if value is None else value
        if not isinstance(value, str):
            raise BadRow(f"'{names[0]}' must be text, found {shortened(value)}")
        if required and not value.strip():
            raise BadRow(f"'{names[0]}' is blank; give it text or remove the row")
        return utf8(value, f"'{names[0]}'")


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def is_empty(value: Any) -> bool:
    """Whether a value is none: null, empty, or NaN, which tables of numbers and pandas have for null."""
    return not value if isinstance(value, str) else value is None or value == [] or value != value


def plain_row(instruction: str, context: str, response: str, category: str) -> Row:
    """A row of one instruction and its response."""
    return _row(instruction, context, response, category, None)


def conversation_row(turns: list[Turn], category: str, system: str = "") -> Row:
    """A row of several turns.

    Args:
        turns: The turns.
        category: Category of the row.
        system: System prompt, added as the first turn unless there is a system turn.

    Raises:
        BadRow: if no turn is the assistant's, a system turn is not the first, or there are two system prompts.
    """
    if system.strip() and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    elif system.strip() and system.strip() != turns[0]["content"].strip():
        raise BadRow(f"turn 1 is a system turn, and the system prompt {shortened(system)} would be lost; remove one")
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise BadRow("no assistant turn, so there is nothing to learn")
    if "system" in roles[1:]:
        raise BadRow(f"turn {roles.index('system', 1) + 1} is a system turn, which may only come first")
    if roles == ["user", "assistant"]:
        return _row(turns[0]["content"], "", turns[1]["content"], category, None)
    last = {turn["role"]: turn["content"] for turn in turns}
    first = {turn["role"]: turn["content"] for turn in reversed(turns)}
    return _row(first.get("user", ""), first.get("system", ""), last["assistant"], category, turns)


def _row(instruction: str, context: str, response: str, category: str, messages: list[Turn] | None) -> Row:
    return {
        "instruction": instruction,
        "context": context,
        "response": response,
        "category": category,
        "messages": messages,
    }


def utf8(text: str, where: str) -> str:
    """Return the text if it can be encoded as UTF-8, else raise `BadRow`."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadRow(f"{where} is not UTF-8, or holds half of a surrogate pair, at character {e.start}") from e
    return text


def shortened(value: Any) -> str:
    """A value of the source as messages show it: as JSON, without secrets, and not too long."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except (RecursionError, ValueError):
        return "a value that is nested too deeply"
    text = masked(text[:MOST_SHOWN])
    return text if len(text) <= 60 else f"{text[:57]}..."
