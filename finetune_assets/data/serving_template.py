"""The chat template that an adapter carries, which renders plain messages exactly as in training.

An experiment with `chat_template` keeps the template of its base model, with dates fixed to the one of training. For an
experiment with `prompt_input` and `prompt_no_input`, a template is written from these prompts: a user message is the
instruction, a message with the role `context` is its context, and what training never saw is refused.

Servers tokenize the text of a chat template without adding special tokens, so the template writes those itself. Where
tokens merge across the end of the prompt, such as a space with the first word of the answer, the merged characters are
left out: in training they are part of the answer's first token.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import Formatter, Template
from typing import TYPE_CHECKING, Any

from finetune_assets.config.schema import Data
from finetune_assets.data.chat.jinja import CLOCK, TODAY
from finetune_assets.data.questions import questions
from finetune_assets.data.rows import Row
from finetune_assets.data.tokenization import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = "context"
"""Role of the message that holds the context of an instruction."""
SAMPLE_QUESTIONS = ("What is the capital of France?", "Name three rivers")
SAMPLE_CONTEXT = "France is a country in Europe."
UNLIMITED = 1 << 30
DATE = re.compile(rf"\b{CLOCK}\(\s*(\"[^\"\\]*\"|'[^'\\]*')\s*\)")
"""Pattern of a call that writes today's date."""
FRAME = Template("""\
{#- Renders a question as in training: the user's message is the instruction, a message with the role context its \
context. -#}
{%- set usage = 'this model was trained on single questions: send one message with the role user, and optionally one \
with the role context before it' -%}
{%- set row = namespace(instruction=none, context=none, response=none) -%}
{%- if tools or documents -%}
  {{- raise_exception('this model was trained without tools and documents; send a passage as a message with the role \
context') -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.content is not string -%}
    {{- raise_exception('the content of a message must be text') -}}
  {%- elif message.role == 'user' and row.instruction is none -%}
    {%- set row.instruction = message.content -%}
  {%- elif message.role == 'context' and row.context is none and row.instruction is none -%}
    {%- set row.context = message.content -%}
  {%- elif message.role == 'assistant' and row.instruction is not none and row.response is none -%}
    {%- set row.response = message.content -%}
  {%- else -%}
    {{- raise_exception(usage ~ '; message ' ~ loop.index ~ ' has the role ' ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if row.instruction is none or (row.response is not none and add_generation_prompt) -%}
  {{- raise_exception(usage) -}}
{%- endif -%}
{%- set instruction = row.instruction -%}
{%- set context = row.context or '' -%}
{%- if context.strip() -%}
  {%- set prompt = $prompt_input -%}
  {%- set merged = $merged_input -%}
{%- else -%}
  {%- set prompt = $prompt_no_input -%}
  {%- set merged = $merged_no_input -%}
{%- endif -%}
$begin
{%- if row.response is not none -%}
  {{- merged ~ row.response$end -}}
{%- endif -%}
""")
"""The template of an experiment with prompts. `merged` is the end of a prompt that is part of the answer's first token.
"""


def use_serving_template(tokenizer: "PreTrainedTokenizerBase", data: Data) -> "PreTrainedTokenizerBase":
    """Give a tokenizer the chat template that an adapter of the experiment carries.

    Args:
        tokenizer: The experiment's tokenizer, which is changed and returned.
        data: The experiment's data settings.
    """
    tokenizer.chat_template = serving_template(tokenizer, data)
    return tokenizer


def serving_template(tokenizer: "PreTrainedTokenizerBase", data: Data) -> Any:
    """The chat template of an experiment's adapters: text, or texts by name if the base model has several.

    Args:
        tokenizer: The tokenizer as in training, with the base model's chat template.
        data: The experiment's data settings.
    """
    if data.prompt_template.chat_template:
        own = tokenizer.chat_template
        return {name: _dated(text) for name, text in own.items()} if isinstance(own, dict) else _dated(own)
    return _of_prompts(tokenizer, data)


def prompt_messages(row: Row) -> list[dict[str, str]]:
    """Plain messages that ask for the answer of a row with instruction and context."""
    question = {"role": "user", "content": row["instruction"]}
    return [{"role": CONTEXT, "content": row["context"]}, question] if row["context"].strip() else [question]


def _dated(template: str) -> str:
    """The template with the date of training instead of today's."""
    return DATE.sub(lambda call: _literal(TODAY.strftime(call[1][1:-1])), template)


def _literal(text: str) -> str:
    """A string literal for all implementations of Jinja, whose escapes for other characters differ."""
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(character, escape)
    return f"'{text}'"


def _of_prompts(tokenizer: "PreTrainedTokenizerBase", data: Data) -> str:
    """The chat template of an experiment with `prompt_input` and `prompt_no_input`.

    The text before a prompt, and the end to leave out of it, are those that give the tokens of training for sample
    questions. If none give them, nothing is left out, and the check `prompt_boundary` fails.
    """
    encoder, template = Encoder(tokenizer, data), data.prompt_template
    encoding = encoder.backend.encode("a")
    added = "".join(encoding.tokens[: encoding.special_tokens_mask.index(0)])  # before every text
    bos = encoder.bos if encoder.adds_bos else ""
    whole = replace(data, tokenization=replace(data.tokenization, cutoff_len=UNLIMITED))
    forms = (template.prompt_input, SAMPLE_CONTEXT), (template.prompt_no_input, "")
    expected = [questions(SAMPLE_QUESTIONS, tokenizer, whole, context) for _, context in forms]
    starts = [_Start(added, bos, space) for space in ((False, True) if added else (False,))]
    start, merged = starts[0], ["", ""]
    for candidate in starts:
        ends = [_merged_end(*form, candidate, encoder, ids) for form, ids in zip(forms, expected, strict=True)]
        found = [end for end in ends if end is not None]
        if len(found) == len(forms):
            start, merged = candidate, found
            break
    prompt_input, prompt_no_input = (_expression(form, end) for (form, _), end in zip(forms, merged, strict=True))
    return FRAME.substitute(
        prompt_input=prompt_input,
        merged_input=_literal(merged[0]),
        prompt_no_input=prompt_no_input,
        merged_no_input=_literal(merged[1]),
        begin=start.written(),
        end=" ~ eos_token" if data.tokenization.add_eos_token else "",
    )


@dataclass(frozen=True)
class _Start:
    """How a prompt begins.

    Attributes:
        added: Special tokens that the tokenizer writes before every text.
        bos: The BOS token if it is the first of them, which training has once if the prompt begins with it too.
        space: Whether to write a space unless the prompt begins with one. Some tokenizers do so at the start of a text,
            but not after a special token.
    """

    added: str
    bos: str
    space: bool

    def before(self, prompt: str) -> str:
        """The prompt as `written` writes it."""
        prompt = prompt.removeprefix(self.bos)
        return self.added + (" " if self.space and not prompt.startswith(" ") else "") + prompt

    def written(self) -> str:
        """The Jinja that writes the prompt."""
        parts = ["bos_token", _literal(self.added.removeprefix(self.bos))] if self.bos else [_literal(self.added)]
        if self.space:
            parts.append("('' if prompt.startswith(' ') else ' ')")
        once = """\
{%- if prompt.startswith(bos_token) -%}
  {%- set prompt = prompt[bos_token | length:] -%}
{%- endif -%}
"""
        return (once if self.bos else "") + f"{{{{- {_joined([*parts, 'prompt'])} -}}}}"


def _merged_end(
    form: str, context: str, start: _Start, encoder: Encoder, expected: Sequence[Sequence[int]]
) -> str | None:
    """The shortest end of a form without which it gives the tokens of training; None if there is none."""
    tail = ""
    for literal, field, *_ in Formatter().parse(form):
        tail = tail + literal if field is None else ""
    prompts = [start.before(form.format(instruction=question, context=context)) for question in SAMPLE_QUESTIONS]
    for length in range(len(tail) + 1):
        texts = [prompt[: len(prompt) - length] for prompt in prompts]
        if [encoder.backend.encode(text, add_special_tokens=False).ids for text in texts] == expected:
            return tail[len(tail) - length :]
    return None


def _expression(form: str, end: str) -> str:
    """A form without its end as a Jinja expression of `instruction` and `context`."""
    parts = []
    for literal, field, spec, conversion in Formatter().parse(form.removesuffix(_escaped(end))):
        parts.append(_literal(literal))
        if spec or conversion:
            shown = f"{field}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
            parts.append(f"{_literal(f'{{{shown}}}')}.format(instruction=instruction, context=context)")
        elif field is not None:
            parts.append(field)
    return _joined(parts)


def _joined(parts: list[str]) -> str:
    return " ~ ".join(part for part in parts if part != _literal(""))


def _escaped(text: str) -> str:
    """A text as a part of a form for `str.format`."""
    return text.replace("{", "{{").replace("}", "}}")
