"""From a row to the text that the model reads, and where in that text it is to learn."""

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from finetune_assets.config.schema import PromptTemplate
from finetune_assets.data.chat import ChatTemplate, Span
from finetune_assets.data.errors import RefusedRow
from finetune_assets.data.layouts import conversation
from finetune_assets.data.rows import Row


class Rendered(NamedTuple):
    """A row as text.

    Attributes:
        text: All that the model reads.
        spans: Where the assistant speaks, as index of the first character and behind the last, in order.
    """

    text: str
    spans: tuple[Span, ...]


Renderer = Callable[[Row], Rendered]


def make_renderer(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The function that renders a row by an experiment's template, or by the tokenizer's own.

    Returns:
        A function that raises `RefusedRow` where the template has no words for a row.

    Raises:
        DataError: if the tokenizer's own is asked for and it has none.
    """
    if not template.chat_template:
        return lambda row: render_prompt(template, row)
    chat = ChatTemplate(tokenizer)
    return lambda row: Rendered(
        *chat.render(row["messages"] or conversation(row["instruction"], row["context"], row["response"]))
    )


def render_prompt(template: PromptTemplate, row: Row) -> Rendered:
    """Fill the prompt with or without input and put the response behind it.

    Raises:
        RefusedRow: for a conversation, which such a prompt cannot hold.
    """
    if row["messages"]:
        raise RefusedRow(
            f"a conversation of {len(row['messages'])} turns, which prompt_input cannot hold; set "
            "data.prompt_template.chat_template to true, or take other rows by data.categories"
        )
    form = template.prompt_input if row["context"].strip() else template.prompt_no_input
    prompt = form.format(instruction=row["instruction"], context=row["context"])
    return Rendered(prompt + row["response"], ((len(prompt), len(prompt) + len(row["response"])),))
