"""From a row as its source writes it to a row of `RAW_SCHEMA`: Dolly's, Alpaca's, and conversations.

Nothing that a person wrote is lost on the way: a key that looks like one of ours and is not, or a turn that holds more
than text, makes a bad row instead.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from finetune_assets.config.schema import Columns
from finetune_assets.data.errors import BadRow
from finetune_assets.data.rows import Row, Turn

KNOWN = {
    "instruction": ("instruction",),
    "context": ("context", "input"),
    "response": ("response", "output"),
    "category": ("category",),
    "system": ("system",),
    "messages": ("messages", "conversations"),
}
"""What each column may be called in the source."""
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
BEYOND_TEXT = (
    *("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "images", "audio"),
    "weight",  # 0 keeps a turn from being learned
)
"""Keys of a turn that say more than its text, which is all that a turn of ours holds."""

Reader = Callable[[dict[str, Any]], Row]


def row_reader(columns: Columns) -> Reader:
    """The function that makes a row of `RAW_SCHEMA` from a row of the source.

    Args:
        columns: The source's own names of columns.

    Returns:
        A function that raises `BadRow` with the reason where a row is none.
    """
    given = {name: (theirs,) for name, theirs in asdict(columns).items() if theirs is not None}
    names = {**KNOWN, **given}

    @lru_cache(maxsize=1_000)
    def lookalikes(keys: tuple[str, ...]) -> list[tuple[str, str]]:
        """Keys that none of ours is, beside the one of ours that they resemble."""
        ours = [name for group in names.values() for name in group]
        near = ((key, get_close_matches(key, ours, 1, 0.75)) for key in keys if key not in ours)
        return [(key, found[0]) for key, found in near if found]

    def read(row: dict[str, Any]) -> Row:
        if not isinstance(row, dict):
            raise BadRow(f"expected a JSON object, found {_short(row)}")
        for key, meant in lookalikes(tuple(row)):
            if row[key] and not row.get(meant):
                raise BadRow(f"unknown key '{key}' would be lost; did you mean '{meant}'?")
        system, category = _text(row, "system", names), _text(row, "category", names, numbers=True)
        messages = _pick(row, names["messages"])
        if messages:
            turns = _turns(messages)
        else:
            asked = _text(row, "instruction", names, required=True), _text(row, "context", names)
            answer = _text(row, "response", names, required=True)
            if not system.strip():
                return _row(*asked, answer, category, None)
            turns = conversation(*asked, answer)
        if system.strip() and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
        return _conversation_row(turns, category)

    return read


def conversation(instruction: str, context: str, response: str) -> list[Turn]:
    """Instruction and answer as two turns; the context stands below the instruction."""
    asked = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": response}]


def _conversation_row(turns: list[Turn], category: str) -> Row:
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


def _pick(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value under the one of these names that has any."""
    found = [(name, row[name]) for name in names if row.get(name) not in (None, "", [])]
    if len(found) > 1 and found[0][1] != found[1][1]:
        raise BadRow(f"'{found[0][0]}' and '{found[1][0]}' both have a value, and one would be lost")
    return found[0][1] if found else row.get(names[0])


def _text(
    row: dict[str, Any], name: str, names: dict[str, tuple[str, ...]], required: bool = False, numbers: bool = False
) -> str:
    theirs = names[name]
    value = _pick(row, theirs)
    if value is None and required and not any(key in row for key in theirs):
        keys = ", ".join(map(str, row))[:200] or "no keys"
        raise BadRow(f"'{theirs[0]}' is missing; found {keys} (name the source's columns in raw_data.yaml: columns)")
    if numbers and isinstance(value, (int, float)):
        value = str(value)
    value = "" if value is None else value
    if not isinstance(value, str):
        raise BadRow(f"'{theirs[0]}' must be text, found {_short(value)}")
    if required and not value.strip():
        raise BadRow(f"'{theirs[0]}' is blank; give it text or remove the row")
    return _clean(value, f"'{theirs[0]}'")


def _clean(text: str, where: str) -> str:
    """The text, if it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadRow(f"{where} is not UTF-8, or holds half of a surrogate pair, at character {e.start}") from e
    return text


def _turns(messages: Any) -> list[Turn]:
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # as CSV has to write it
        try:
            messages = json.loads(messages)
        except ValueError as e:
            raise BadRow(f"'messages' is not a JSON list: {e}") from e
    if not isinstance(messages, list):
        raise BadRow(f"'messages' must be a list of turns, found {_short(messages)}")
    return [_turn(message, f"turn {number}") for number, message in enumerate(messages, 1)]


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise BadRow(f"{where} must be an object with role and content, found {_short(message)}")
    for key in BEYOND_TEXT:
        if message.get(key) not in (None, "", [], {}, 1):
            raise BadRow(f"{where}: '{key}' would be lost; only text is taken")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{where}: unknown role {_short(role)}; known are {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text")
    if not isinstance(content, str):
        raise BadRow(f"{where}: content must be text, found {_short(content)}")
    if not content.strip():
        raise BadRow(f"{where}: content is blank")
    return {"role": ROLES[role], "content": _clean(content, where)}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
