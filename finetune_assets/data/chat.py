"""Conversations in a tokenizer's own chat template, and where in its text the assistant speaks.

A template that marks what the assistant generates (`{% generation %}`) is believed. Any other is first rendered with
stand-ins in place of every turn's words: what is left around them is the template's own, the same for all conversations
of these roles. A conversation's text must then be that frame with its words put in, which is checked to the last
character, so short answers are never looked for. Where a template rewrites the last answer (one with reasoning, say),
that one is all that the template adds to its own prompt; where it rewrites more, the conversation is refused.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from finetune_assets.data.errors import DataError, RefusedRow
from finetune_assets.data.rows import Turn

MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""As transformers looks for it."""
STAND_IN = "\ue000{}\ue001"
"""In place of a turn's words; characters of Unicode's private use area occur in no template."""

Span = tuple[int, int]


class Frame(NamedTuple):
    """What a template writes around the turns of some roles.

    Attributes:
        pieces: Text before the first turn's words, between the words, and behind the last's; one more than turns.
        ends: How many characters of the piece behind a turn still belong to it (its end mark).
    """

    pieces: tuple[str, ...]
    ends: tuple[int, ...]


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: Whose template.

    Raises:
        DataError: if it has none, or none that can be read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = tokenizer.name_or_path
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError as e:
            raise DataError(
                f"{self.name}: data.prompt_template.chat_template is true and this tokenizer has no chat "
                "template; take an instruct model, or set it to false and use prompt_input and prompt_no_input"
            ) from e
        self.marked = MARKS_GENERATION.search(self.template) is not None
        self.special = tokenizer.special_tokens_map
        self.frame = lru_cache(maxsize=10_000)(self._frame)

    def render(self, turns: Sequence[Turn]) -> tuple[str, tuple[Span, ...]]:
        """The text of a conversation up to the assistant's last turn, and where the assistant speaks in it.

        A span holds the words and the mark that ends the turn, so that the model learns to stop.

        Raises:
            RefusedRow: if the template refuses the conversation, or rewrites its words.
        """
        roles = [turn["role"] for turn in turns]
        turns = turns[: len(roles) - roles[::-1].index("assistant")]
        text, marked = self._render(turns)
        if self.marked:
            return text, marked
        return text, _locate(text, turns, self.frame(tuple(roles[: len(turns)]))) or self._rewritten(text, turns)

    def _render(self, turns: Sequence[Turn], prompt: bool = False) -> tuple[str, tuple[Span, ...]]:
        try:
            (text,), spans = render_jinja_template(
                [list(turns)],
                chat_template=self.template,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=prompt,
                **self.special,
            )
        except TemplateSyntaxError as e:
            raise DataError(f"{self.name}: its chat template is no template: {e}; repair chat_template.jinja") from e
        except (TemplateError, TypeError, ValueError, KeyError) as e:
            raise RefusedRow(f"the tokenizer's chat template refuses it: {e}") from e
        return text, tuple((int(start), int(end)) for start, end in spans[0]) if self.marked else ()

    def _rewritten(self, text: str, turns: Sequence[Turn]) -> tuple[Span, ...]:
        """The spans of a conversation whose last turn the template rewrites: that one is all that it adds."""
        asked, _ = self._render(turns[:-1], prompt=True)
        earlier = _locate(asked, turns[:-1], self.frame(tuple(turn["role"] for turn in turns[:-1]), prompt=True))
        if earlier is None or not text.startswith(asked) or len(asked) == len(text):
            raise RefusedRow(
                "the tokenizer's chat template rewrites what was said, so that it cannot be told which of its text is "
                f"the assistant's; the last turn is {turns[-1]['content'][:60]!r}"
            )
        return (*earlier, (len(asked), len(text)))

    def _frame(self, roles: tuple[str, ...], prompt: bool = False) -> Frame:
        stand_ins = [STAND_IN.format(i) for i in range(len(roles))]
        turns = [{"role": role, "content": stand_in} for role, stand_in in zip(roles, stand_ins, strict=True)]
        rest, _ = self._render(turns, prompt)
        pieces = []
        for stand_in in stand_ins:
            piece, found, rest = rest.partition(stand_in)
            if not found:
                raise RefusedRow("the tokenizer's chat template leaves out some of its turns")
            pieces.append(piece)
        pieces.append(rest)
        return Frame(tuple(pieces), tuple(self._end(turns[: i + 1], pieces[i + 1]) for i in range(len(turns))))

    def _end(self, turns: Sequence[Turn], following: str) -> int:
        """Characters behind the last of `turns` that are its own: they stand there before another turn follows."""
        if turns[-1]["role"] != "assistant":
            return 0
        text, _ = self._render(turns)
        own = text.partition(turns[-1]["content"])[2]
        return next((n for n in range(len(own), -1, -1) if following.startswith(own[:n])), 0)


def _locate(text: str, turns: Sequence[Turn], frame: Frame) -> tuple[Span, ...] | None:
    """Lay the frame over the text, turn by turn; None where it does not fit. A template may strip white space off."""
    if not text.startswith(frame.pieces[0]):
        return None
    at, spans = len(frame.pieces[0]), []
    for turn, following, own in zip(turns, frame.pieces[1:], frame.ends, strict=True):
        words = turn["content"]
        forms = (words, words.strip(), words.lstrip(), words.rstrip())
        written = next((form for form in forms if text.startswith(form + following, at)), None)
        if written is None:
            return None
        if turn["role"] == "assistant":
            spans.append((at, at + len(written) + own))
        at += len(written) + len(following)
    return tuple(spans) if at == len(text) else None
