"""Joins the columns of a row that together hold one conversation, or refuses the row where that is ambiguous."""

import re
from typing import Any

from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.conversation import CALL_ROLES, ROLES
from finetune_assets.data.layouts.tools import from_json
from finetune_assets.data.layouts.values import Values, is_empty, shortened

LOOKS_LIKE_TURNS = re.compile(r"\s*\[\s*\{\s*['\"](role|from)['\"]\s*:")
"""Pattern of the beginning of turns as text, also in Python's notation, as pandas writes them to CSV."""


def join_turns(values: Values) -> Values:
    """Join the columns of a row with turns to a single list of turns in the column `messages`.

    - `messages` that end with a user's turn, and a response: the response is the answer.
    - `messages`, and an instruction, context or response that is in them already: nothing is added.
    - A prompt and a completion, of which at least one is a list of turns (as in TRL): the turns in order. As in TRL,
      only the completion is learned.

    Args:
        values: A row.

    Returns:
        The same values if nothing is to be joined.

    Raises:
        BadRow: naming both columns, if one of them would be lost.
    """
    name, messages = values.find("messages")
    if name is not None:
        turns = turns_of(messages)
        return values if turns is None else _with_messages(values, _add_columns(values, name, turns))
    (prompt_name, prompt), (answer_name, answer) = values.find("instruction"), values.find("response")
    turns = [turns_of(prompt), turns_of(answer)]
    are_texts = isinstance(prompt, str) and isinstance(answer, str)
    if are_texts and LOOKS_LIKE_TURNS.match(prompt) and None in turns:  # an answer alone may well be JSON
        raise BadRow(
            f"'{prompt_name}' and '{answer_name}' look like turns, but are not both JSON lists of turns; write them as "
            "JSON, or all turns in 'messages'"
        )
    if None in turns and (are_texts or turns == [None, None]):
        return values
    if prompt_name is None or answer_name is None:
        missing = "'response' is missing: rows without an answer are for reinforcement learning, such as GRPO"
        raise BadRow(missing if prompt_name else f"'instruction' is missing beside the turns of '{answer_name}'")
    for column in ("context", "history"):
        _refuse(values, column, prompt_name)
    if not are_texts:
        turns = [_as_turns(prompt, "user", prompt_name), _as_turns(answer, "assistant", answer_name)]
    earlier, learned = turns
    return _with_messages(values, [*map(_unlearned, earlier or ()), *(learned or ())])


def _with_messages(values: Values, turns: list[Any]) -> Values:
    return Values({**values.row, "messages": turns}, {**values.names, "messages": ("messages",)})


def _add_columns(values: Values, name: str, turns: list[Any]) -> list[Any]:
    """The turns of `messages`, after comparing them with the row's other columns."""
    contents = [_content(turn) or "" for turn in turns]
    prompt_name, prompt = values.find("instruction")
    if prompt_name is not None:
        begin = turns_of(prompt)
        is_in = turns[: len(begin)] == begin if begin else _is_part(prompt, contents)
        if not is_in:
            _refuse(values, "instruction", name)
    if not _is_part(values.find("context")[1], contents):
        _refuse(values, "context", name)
    _refuse(values, "history", name)
    answer_name, answer = values.find("response")
    if answer_name is None or not turns:
        return turns
    if speaker(turns[-1]) == "user":
        return [*turns, *_as_turns(answer, "assistant", answer_name)]
    end = turns_of(answer)
    is_in = turns[-len(end) :] == end if end else _stripped(answer) == contents[-1]
    if not is_in:
        _refuse(values, "response", name)
    return turns


def _is_part(value: Any, contents: list[str]) -> bool:
    """Whether a text is a turn, or whole lines of one, so that it is not lost."""
    text = _stripped(value)
    return text is not None and any(f"\n{text}\n" in f"\n{content}\n" for content in contents)


def _refuse(values: Values, column: str, other: str) -> None:
    """Raise `BadRow` if a column has a value."""
    name, value = values.find(column)
    if name is not None:
        raise BadRow(
            f"'{other}' and '{name}' both have a value, and '{name}' is not in '{other}', so one would be lost "
            f"({shortened(value)}); remove one, or list it in raw_data.yaml: columns.ignore"
        )


def turns_of(value: Any) -> list[Any] | None:
    """A list of turns, also as JSON in a CSV field; None for anything else."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return None
        try:
            value = from_json(value, "turns")
        except BadRow:  # of `messages`, the conversation's layout reports it
            return None
    is_turns = isinstance(value, list) and value and all(isinstance(turn, dict) and _role(turn) for turn in value)
    return value if is_turns else None


def _as_turns(value: Any, role: str, name: str) -> list[Any]:
    """A list of turns as it is, and a text as a turn of a role."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = turns_of(value)
    if turns is None:
        raise BadRow(f"'{name}' must be text or a list of turns, found {shortened(value)}")
    return turns


def _unlearned(turn: Any) -> Any:
    """A turn of a prompt; a weight of 0 excludes the assistant's from the loss."""
    return {**turn, "weight": 0} if speaker(turn) == "assistant" else turn


def _role(turn: Any) -> Any:
    return turn.get("from") if turn.get("role") is None else turn["role"]


def speaker(turn: Any) -> str | None:
    """Role of a turn in the names of `RAW_SCHEMA`; None if it is unknown."""
    role = _role(turn)
    if not isinstance(role, str):
        return None
    return "assistant" if role in CALL_ROLES else ROLES.get(role)


def _content(turn: Any) -> str | None:
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return _stripped(content)


def _stripped(value: Any) -> str | None:
    return value.strip() if isinstance(value, str) and not is_empty(value) else None
