"""A row rendered as text."""

from typing import NamedTuple

Span = tuple[int, int]
"""First character and end (exclusive) of a part of a text."""


class Rendered(NamedTuple):
    """A row rendered as text.

    Attributes:
        text: Complete input text of the model.
        spans: Spans of the text to learn, in order. A span of a conversation includes the end mark of its turn, so that
            the model learns to stop.
        masked: Spans of assistant turns with weight 0, which are never learned.
        omitted: Parts of the row that the chat template does not render although nothing to learn is lost, such as the
            names of speakers.
    """

    text: str
    spans: tuple[Span, ...]
    masked: tuple[Span, ...] = ()
    omitted: tuple[str, ...] = ()
