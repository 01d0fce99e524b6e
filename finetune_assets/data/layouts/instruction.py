"""Dolly's and Alpaca's layout: an instruction, its context, and the response."""

from finetune_assets.data.layouts.layout import Layout
from finetune_assets.data.layouts.tools import tool_definitions
from finetune_assets.data.layouts.values import Values, conversation_row, plain_row
from finetune_assets.data.rows import Row, Turn


def read(values: Values, category: str, system: str) -> Row:
    prompt = values.text("instruction", required=True), values.text("context")
    response = values.text("response", required=True)
    if tools := tool_definitions(values.pick("tools")):
        turns = conversation(*prompt, response)
        row = conversation_row(turns, category, system)
        return {**row, "messages": row["messages"] or turns, "tools": tools}
    if not system.strip():
        return plain_row(*prompt, response, category)
    return conversation_row(conversation(*prompt, response), category, system)


def conversation(instruction: str, context: str, response: str) -> list[Turn]:
    """Instruction and response as two turns; the context follows the instruction."""
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


INSTRUCTION = Layout(
    "instruction",
    {"instruction": ("instruction",), "context": ("context", "input"), "response": ("response", "output")},
    read,
)
