"""Conversations: a list of turns with role and content, in OpenAI's or ShareGPT's names."""

import json
from typing import Any

from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.layout import Layout
from finetune_assets.data.layouts.values import Values, conversation_row, shortened, utf8
from finetune_assets.data.rows import Row, Turn

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
BEYOND_TEXT = (
    *("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "images", "audio"),
    "weight",  # 0 excludes a turn from the loss
)
"""Keys of a turn with content other than text, which `Turn` cannot represent."""


def read(values: Values, category: str, system: str) -> Row:
    return conversation_row(_turns(values.pick("messages")), category, system)


def _turns(messages: Any) -> list[Turn]:
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # a list in a CSV field
        try:
            messages = json.loads(messages)
        except ValueError as e:
            raise BadRow(f"'messages' is not a JSON list: {e}") from e
    if not isinstance(messages, list):
        raise BadRow(f"'messages' must be a list of turns, found {shortened(messages)}")
    return [_turn(message, f"turn {number}") for number, message in enumerate(messages, 1)]


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise BadRow(f"{where} must be an object with role and content, found {shortened(message)}")
    for key in BEYOND_TEXT:
        if message.get(key) not in (None, "", [], {}, 1):
            raise BadRow(f"{where}: '{key}' would be lost; only text is supported")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{where}: unknown role {shortened(role)}; known roles: {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text")
    if not isinstance(content, str):
        raise BadRow(f"{where}: content must be text, found {shortened(content)}")
    if not content.strip():
        raise BadRow(f"{where}: content is blank")
    return {"role": ROLES[role], "content": utf8(content, where)}


CONVERSATION = Layout("messages", {"messages": ("messages", "conversations")}, read)
