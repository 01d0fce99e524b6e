"""Conversations: a list of turns with role and content, in the names of OpenAI, ShareGPT and LLaMA-Factory."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.layout import Layout
from finetune_assets.data.layouts.tools import EMPTY, from_json, tool_calls, tool_definitions
from finetune_assets.data.layouts.turn_keys import check_keys, ignored_keys, names_of, reasoning_of, weight_of
from finetune_assets.data.layouts.values import Values, conversation_row, shortened, utf8
from finetune_assets.data.rows import Row, Turn

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "environment"), "tool"),
    **dict.fromkeys(("tool_response", "function_response", "tool_result", "function_result"), "tool"),
}
"""Accepted names of each role."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles of assistant turns whose content is a tool call in JSON."""
CONTENT_KEYS = ("content", "value")
PART_TEXT_KEYS = ("text", "value", "content")
PART_TYPES = (None, "text", "input_text", "output_text")
NAMES = ("messages", "conversations")


def read(values: Values, category: str, system: str) -> Row:
    turns = _turns(values.pick("messages"))
    if not turns:
        raise BadRow("'messages' has no turns")
    tools = tool_definitions(values.pick("tools"))
    learned = [turn for turn in turns if turn["role"] == "assistant" and turn.get("weight") != 0]
    row = conversation_row(turns, category, system)
    if not learned:
        raise BadRow("every assistant turn has 'weight' 0, so there is nothing to learn")
    if row["messages"] is None and (tools or any(len(turn) > 2 for turn in turns)):
        row["messages"] = turns
    return {**row, "response": learned[-1]["content"] or learned[-1]["tool_calls"], "tools": tools}


def ignored_turn_keys(row: Mapping[str, Any], names: Sequence[str] = NAMES) -> list[str]:
    """Keys of turns that `read` passes over although they have a value (identifiers and other metadata), sorted.

    Args:
        row: A row of the source.
        names: Accepted names of the column with the turns.
    """
    try:
        turns = _listed(next((row[name] for name in names if row.get(name)), None))
    except BadRow:
        return []
    return sorted({key for turn in turns if isinstance(turn, dict) for key in ignored_keys(turn)})


def _turns(messages: Any) -> list[Turn]:
    return [_turn(message, f"turn {number}") for number, message in enumerate(_listed(messages), 1)]


def _listed(messages: Any) -> list[Any]:
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # a list in a CSV field
        messages = from_json(messages, "'messages'")
    if not isinstance(messages, list):
        raise BadRow(f"'messages' must be a list of turns, found {shortened(messages)}")
    return messages


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise BadRow(f"{where} must be an object with role and content, found {shortened(message)}")
    check_keys(message, where)
    speakers = {key: message[key] for key in ("role", "from") if message.get(key) is not None}
    written = next(iter(speakers.values()), None)
    if any(speaker != written for speaker in speakers.values()):
        raise BadRow(f"{where}: 'role' and 'from' both have a value, and one would be lost")
    if not isinstance(written, str) or written not in (*ROLES, *CALL_ROLES):
        known = ", ".join(dict.fromkeys((*ROLES.values(), *ROLES, *CALL_ROLES)))
        raise BadRow(f"{where}: unknown role {shortened(written)}; known roles: {known}")
    role = ROLES.get(written, "assistant")
    content = _content(message, where)
    calls = _calls(message, role, where)
    if written in CALL_ROLES:
        if calls:
            raise BadRow(f"{where}: role '{written}' and 'tool_calls' both hold a call, and one would be lost")
        content, calls = "", tool_calls(content, f"{where}: role '{written}'")
        if calls is None:
            raise BadRow(f"{where}: content is blank; role '{written}' requires a tool call in JSON")
    if not content.strip() and not calls and role != "tool":  # a tool may return nothing
        raise BadRow(f"{where}: content is blank")
    optional = {
        "reasoning_content": reasoning_of(message, role, where),
        "tool_calls": calls,
        **names_of(message, where),
        "weight": weight_of(message, role, where),
    }
    turn = {"role": role, "content": utf8(content, where) if content.strip() else ""}
    return turn | {key: value for key, value in optional.items() if value is not None}


def _calls(message: dict[str, Any], role: str, where: str) -> str | None:
    calls, call = message.get("tool_calls"), message.get("function_call")
    if calls not in EMPTY and call not in EMPTY:
        raise BadRow(f"{where}: 'tool_calls' and 'function_call' both have a value, and one would be lost")
    key = "function_call" if calls in EMPTY else "tool_calls"
    text = tool_calls(call if calls in EMPTY else calls, f"{where}: '{key}'")
    if text and role != "assistant":
        raise BadRow(f"{where}: '{key}' would be lost; only assistant turns call tools, not {role} turns")
    return text


def _content(message: dict[str, Any], where: str) -> str:
    """The content as text; that of several text parts is joined without a separator, as chat templates do."""
    given = {key: message[key] for key in CONTENT_KEYS if message.get(key) is not None}
    if len(given) > 1 and given["content"] != given["value"]:
        raise BadRow(f"{where}: 'content' and 'value' both have a value, and one would be lost")
    content = next(iter(given.values()), None)
    if content is None and any(message.get(key) not in EMPTY for key in ("tool_calls", "function_call")):
        return ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}, part {number}") for number, part in enumerate(content, 1))
    if not isinstance(content, str):
        raise BadRow(f"{where}: content must be text, found {shortened(content)}")
    return content


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise BadRow(f"{where} of the content must be an object with type and text, found {shortened(part)}")
    if part.get("type") not in PART_TYPES:
        raise BadRow(f"{where} of the content is {shortened(part['type'])}; only text is supported")
    texts = [part[key] for key in PART_TEXT_KEYS if part.get(key) is not None]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise BadRow(f"{where} of the content must have one text, found {shortened(part)}")
    for key, value in part.items():
        if key not in ("type", "cache_control", *PART_TEXT_KEYS) and value not in EMPTY:
            raise BadRow(f"{where}: '{key}' of the content would be lost; only text is supported")
    return texts[0]


CONVERSATION = Layout("messages", {"messages": NAMES, "tools": ("tools", "functions")}, read)
