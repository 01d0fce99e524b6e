"""Renders rows as input text of the model, with the character spans to learn."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from finetune_assets.config.schema import PromptTemplate
from finetune_assets.data.chat import ChatTemplate, Rendered
from finetune_assets.data.errors import RefusedRow
from finetune_assets.data.layouts.instruction import conversation
from finetune_assets.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Renderer = Callable[[Row], Rendered]


def make_renderer(template: PromptTemplate, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """Create the function that renders a row with the experiment's prompts or the tokenizer's chat template.

    Returns:
        A function that raises `RefusedRow` if a row cannot be rendered, and can be pickled.

    Raises:
        DataError: if `chat_template` is set and the tokenizer has none.
    """
    if not template.chat_template:
        return partial(render_prompt, template)
    return partial(_render_chat, ChatTemplate(tokenizer))


def _render_chat(chat: ChatTemplate, row: Row) -> Rendered:
    return chat.render(
        row["messages"] or conversation(row["instruction"], row["context"], row["response"]), row.get("tools")
    )


def render_prompt(template: PromptTemplate, row: Row) -> Rendered:
    """Fill the prompt with or without a context and append the response.

    Raises:
        RefusedRow: for a conversation, which such a prompt cannot represent.
    """
    if row["messages"]:
        raise RefusedRow(
            f"a conversation of {len(row['messages'])} turns cannot be rendered with prompt_input; set "
            "data.prompt_template.chat_template to true, or select other rows with data.categories"
        )
    form = template.prompt_input if row["context"].strip() else template.prompt_no_input
    prompt = form.format(instruction=row["instruction"], context=row["context"])
    return Rendered(prompt + row["response"], ((len(prompt), len(prompt) + len(row["response"])),))
