"""Renders conversations with a tokenizer's chat template and locates the assistant's text.

If a template marks the assistant's text with `{% generation %}`, these marks are used. Any other template is first
rendered with placeholders instead of the turns' content: the text around them belongs to the template and is the same
for all conversations with these roles. A conversation's text must then equal this frame with the content inserted. This
is verified to the last character, so short answers are never searched for. If a template rewrites the last answer (for
example, one with reasoning), that answer is everything the template adds to its own generation prompt. If it rewrites
more, the conversation is refused.
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
"""Pattern of the generation tag, as in transformers."""
STAND_IN = "\ue000{}\ue001"
"""Placeholder for a turn's content; characters of Unicode's private use area occur in no template."""

Span = tuple[int, int]


class Frame(NamedTuple):
    """Text that a template writes around turns with given roles.

    Attributes:
        pieces: Text before the first turn's content, between contents, and after the last; one more than turns.
        ends: For each turn, number of characters of the following piece that belong to the turn (its end mark).
    """

    pieces: tuple[str, ...]
    ends: tuple[int, ...]


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.

    Raises:
        DataError: if the tokenizer has no usable chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = tokenizer.name_or_path
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError as e:
            raise DataError(
                f"{self.name}: data.prompt_template.chat_template is true, but this tokenizer has no chat template; "
                "use an instruct model, or set chat_template to false and use prompt_input and prompt_no_input"
            ) from e
        self.marked = MARKS_GENERATION.search(self.template) is not None
        self.special = tokenizer.special_tokens_map
        self.frame = lru_cache(maxsize=10_000)(self._frame)

    def render(self, turns: Sequence[Turn]) -> tuple[str, tuple[Span, ...]]:
        """Render a conversation up to the assistant's last turn.

        Returns:
            The text, and the character spans of the assistant's turns. A span includes the end mark of its turn, so
            that the model learns to stop.

        Raises:
            RefusedRow: if the template rejects the conversation, or rewrites its content.
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
            raise DataError(f"{self.name}: invalid chat template: {e}; repair chat_template.jinja") from e
        except (TemplateError, TypeError, ValueError, KeyError) as e:
            raise RefusedRow(f"rejected by the tokenizer's chat template: {e}") from e
        return text, tuple((int(start), int(end)) for start, end in spans[0]) if self.marked else ()

    def _rewritten(self, text: str, turns: Sequence[Turn]) -> tuple[Span, ...]:
        """The spans if the template rewrites the last turn: that turn is everything after the generation prompt."""
        before, _ = self._render(turns[:-1], prompt=True)
        earlier = _locate(before, turns[:-1], self.frame(tuple(turn["role"] for turn in turns[:-1]), prompt=True))
        if earlier is None or not text.startswith(before) or len(before) == len(text):
            raise RefusedRow(
                "the tokenizer's chat template rewrites the turns, so the assistant's text cannot be located; "
                f"the last turn is {turns[-1]['content'][:60]!r}"
            )
        return (*earlier, (len(before), len(text)))

    def _frame(self, roles: tuple[str, ...], prompt: bool = False) -> Frame:
        stand_ins = [STAND_IN.format(i) for i in range(len(roles))]
        turns = [{"role": role, "content": stand_in} for role, stand_in in zip(roles, stand_ins, strict=True)]
        rest, _ = self._render(turns, prompt)
        pieces = []
        for stand_in in stand_ins:
            piece, separator, rest = rest.partition(stand_in)
            if not separator:
                raise RefusedRow("the tokenizer's chat template omits some of the turns")
            pieces.append(piece)
        pieces.append(rest)
        return Frame(tuple(pieces), tuple(self._end(turns[: i + 1], pieces[i + 1]) for i in range(len(turns))))

    def _end(self, turns: Sequence[Turn], following: str) -> int:
        """Length of the last turn's end mark: the start of `following` that is also written without a next turn."""
        if turns[-1]["role"] != "assistant":
            return 0
        text, _ = self._render(turns)
        own = text.partition(turns[-1]["content"])[2]
        return next((n for n in range(len(own), -1, -1) if following.startswith(own[:n])), 0)


def _locate(text: str, turns: Sequence[Turn], frame: Frame) -> tuple[Span, ...] | None:
    """Match the frame with the text, turn by turn; None if it does not fit. A template may strip white space."""
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
