"""Dolly's and Alpaca's layout: an instruction, its context, and the response; earlier turns in `history`."""

from typing import Any

from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.layout import Layout
from finetune_assets.data.layouts.tools import from_json, tool_definitions
from finetune_assets.data.layouts.values import Values, conversation_row, is_empty, plain_row, shortened, utf8
from finetune_assets.data.rows import Row, Turn


def read(values: Values, category: str, system: str) -> Row:
    prompt = values.text("instruction", required=True), values.text("context")
    response = values.text("response", required=True)
    earlier, tools = _earlier_turns(values.pick("history")), tool_definitions(values.pick("tools"))
    if tools:
        turns = [*earlier, *conversation(*prompt, response)]
        row = conversation_row(turns, category, system)
        return {**row, "messages": row["messages"] or turns, "tools": tools}
    if not earlier and not system.strip():
        return plain_row(*prompt, response, category)
    return conversation_row([*earlier, *conversation(*prompt, response)], category, system)


def conversation(instruction: str, context: str, response: str) -> list[Turn]:
    """Instruction and response as two turns; the context follows the instruction."""
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _earlier_turns(history: Any) -> list[Turn]:
    """The turns of Alpaca's `history`: pairs of question and answer."""
    if isinstance(history, str) and history.lstrip().startswith("["):  # a list in a CSV field
        history = from_json(history, "'history'")
    if is_empty(history):
        return []
    if not isinstance(history, list):
        raise BadRow(f"'history' must be a list of [question, answer] pairs, found {shortened(history)}")
    return [turn for number, pair in enumerate(history, 1) for turn in _pair(pair, f"'history', pair {number}")]


def _pair(pair: Any, where: str) -> list[Turn]:
    is_pair = isinstance(pair, list) and len(pair) == 2
    if not is_pair or not all(isinstance(text, str) and text.strip() for text in pair):
        raise BadRow(f"{where} must be [question, answer], both text, found {shortened(pair)}")
    return conversation(utf8(pair[0], where), "", utf8(pair[1], where))


INSTRUCTION = Layout(
    "instruction",
    {
        "instruction": ("instruction", "question", "prompt", "query"),
        "context": ("context", "input", "passage"),
        "response": ("response", "output", "answer", "completion"),
        "history": ("history",),
    },
    read,
)
