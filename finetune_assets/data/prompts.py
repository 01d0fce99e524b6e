"""From a row to the text that the model reads, and where in that text its answer begins."""

from collections.abc import Callable
from os.path import commonprefix
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from finetune_assets.config.schema import PromptTemplate
from finetune_assets.data.sources import DataError

Row = dict[str, str]


class Rendered(NamedTuple):
    """A row as text.

    Attributes:
        text: Prompt and response.
        response_start: Index of the response's first character.
    """

    text: str
    response_start: int


Renderer = Callable[[Row], Rendered]


def make_renderer(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The function that renders a row by an experiment's template, or by the tokenizer's own.

    Raises:
        DataError: if the tokenizer's own is asked for and it has none.
    """
    if not template.chat_template:
        return lambda row: render_prompt(template, row)
    if not tokenizer.chat_template:
        raise DataError(
            f"{tokenizer.name_or_path}: data.prompt_template.chat_template is true and this tokenizer has no chat "
            "template; take an instruct model, or set it to false and use prompt_input and prompt_no_input"
        )
    return lambda row: render_chat(tokenizer, row)


def render_prompt(template: PromptTemplate, row: Row) -> Rendered:
    """Fill the prompt with or without input and put the response behind it."""
    form = template.prompt_input if row["context"].strip() else template.prompt_no_input
    prompt = form.format(instruction=row["instruction"], context=row["context"])
    return Rendered(prompt + row["response"], len(prompt))


def render_chat(tokenizer: PreTrainedTokenizerBase, row: Row) -> Rendered:
    """One user turn (the instruction, its context below it) and one assistant turn."""
    user = f"{row['instruction']}\n\n{row['context']}" if row["context"].strip() else row["instruction"]
    answer = row["response"].strip()
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    start = text.find(answer, len(commonprefix([prompt, text])))  # noqa: RUF071 (texts, not paths)
    if start < 0:
        raise DataError(f"{tokenizer.name_or_path}: its chat template changes the answer {answer[:60]!r}")
    return Rendered(text, start)
