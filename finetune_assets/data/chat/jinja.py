"""Renders messages with a chat template, independently of the day."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from finetune_assets.data.chat.limits import check_template
from finetune_assets.data.chat.rendered import Span
from finetune_assets.data.errors import DataError, RefusedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Pattern of the generation tag, as in transformers."""
TODAY = datetime(2024, 7, 26)
"""The date that templates with `strftime_now` write, so that a dataset does not depend on the day it is prepared. It is
the date that the templates of Llama 3 write where no date is known."""
CLOCK = "strftime_now"
FIXED = "{{ '' }}"
"""Written at the end of a template, so that its compiled form is not the one that transformers caches for others."""


class Jinja:
    """The chat template of a tokenizer.

    Args:
        tokenizer: The tokenizer.

    Raises:
        DataError: if the tokenizer has no usable chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.name = tokenizer.name_or_path
        try:
            template = tokenizer.get_chat_template()
        except ValueError as e:
            raise DataError(
                f"{self.name}: data.prompt_template.chat_template is true, but this tokenizer has no chat template; "
                "use an instruct model, or set chat_template to false and use prompt_input and prompt_no_input"
            ) from e
        self.marked = MARKS_GENERATION.search(template) is not None
        self.special = tokenizer.special_tokens_map
        self.template = template.removesuffix("\n") + FIXED if CLOCK in template else template
        check_template(self.name, template, self.special)

    def render(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None, prompt: bool = False
    ) -> tuple[str, tuple[Span, ...]]:
        """Render messages.

        Args:
            messages: The messages, as chat templates take them.
            tools: Tool definitions.
            prompt: Add the generation prompt of the next assistant turn.

        Returns:
            The text, and the spans of the template's generation marks.

        Raises:
            RefusedRow: if the template rejects the messages.
            DataError: if the template is invalid.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        try:
            if self.template.endswith(FIXED):
                _compile_jinja_template(self.template).globals[CLOCK] = TODAY.strftime
            (text,), spans = render_jinja_template(
                [list(messages)],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=prompt,
                **self.special,
            )
        except (TemplateSyntaxError, SyntaxError) as e:
            raise DataError(f"{self.name}: invalid chat template: {e}; repair chat_template.jinja") from e
        except Exception as e:  # a template is a program, which may raise any: too long a text, a division by zero
            reason = str(e) or type(e).__name__
            raise RefusedRow(f"rejected by the tokenizer's chat template: {reason}") from e
        return text, tuple((int(start), int(end)) for start, end in spans[0]) if self.marked else ()
