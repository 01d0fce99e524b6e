"""Chat templates: conversations as text, and the spans of the assistant's text."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune_assets.data.chat.frames import Frame, FrameMaker, pieces_of
from finetune_assets.data.chat.jinja import Jinja
from finetune_assets.data.chat.messages import (
    CONTENT,
    FORMS,
    Message,
    Shape,
    fields,
    formed,
    parsed,
    shapes,
    with_stand_ins,
)
from finetune_assets.data.chat.rendered import Rendered, Span
from finetune_assets.data.errors import RefusedRow
from finetune_assets.data.rows import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[dict[str, Any]] | None


class Located(NamedTuple):
    """The assistant turns of a text.

    Attributes:
        turns: Index of each turn.
        spans: Span of each turn with its end mark.
    """

    turns: tuple[int, ...]
    spans: tuple[Span, ...]


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.

    Raises:
        DataError: if the tokenizer has no usable chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.jinja = Jinja(tokenizer)
        self.maker = FrameMaker(self.jinja, list(tokenizer.get_added_vocab()))
        self.cached = lru_cache(maxsize=10_000)(self._frame)

    def __getstate__(self) -> dict[str, Any]:
        return {"jinja": self.jinja, "maker": self.maker}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.cached = lru_cache(maxsize=10_000)(self._frame)

    def render(self, turns: Sequence[Turn], tools: str | None = None) -> Rendered:
        """Render a conversation up to the last assistant turn that is learned.

        Args:
            turns: The turns.
            tools: JSON list of tool definitions.

        Raises:
            RefusedRow: if the template rejects the conversation, rewrites it, or omits a part of it.
        """
        learned = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight") != 0]
        turns = turns[: learned[-1] + 1]
        messages, definitions = parsed(turns), json.loads(tools) if tools else None
        try:
            frame = self.frame(shapes(messages), definitions is not None)
        except RefusedRow:
            plain = definitions is None and all(message.keys() <= {"role", CONTENT} for message in messages)
            all_learned = len(learned) == sum(turn["role"] == "assistant" for turn in turns)
            if not (self.jinja.marked and plain and all_learned):
                raise
            return self._rewritten_as_marked(messages)
        text, marks = self.jinja.render(formed(messages, frame.form), definitions)
        located = self._locate(text, messages, definitions, frame) or self._rewritten(text, messages, definitions)
        if self.jinja.marked:
            located = _marked(self._with_ends(text, marks), located)
        pairs = list(zip(located.turns, located.spans, strict=True))
        spans = tuple(span for turn, span in pairs if turn in learned)
        return Rendered(text, spans, tuple(span for turn, span in pairs if turn not in learned), frame.omitted)

    def prompt(self, turns: Sequence[Turn], tools: str | None = None) -> str:
        """Render a conversation up to its last assistant turn that is learned, as a server that asks for this turn.

        Args:
            turns: The turns.
            tools: JSON list of tool definitions.

        Raises:
            RefusedRow: if the template rejects the turns before it.
        """
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight") != 0)
        messages, definitions = parsed(turns[:last]), json.loads(tools) if tools else None
        form = FORMS[0]
        if any("tool_calls" in message for message in messages):
            form = self.frame(shapes(messages), definitions is not None, prompt=True).form
        return self.jinja.render(formed(messages, form), definitions, prompt=True)[0]

    def _rewritten_as_marked(self, messages: list[Message]) -> Rendered:
        """A conversation whose words the template rewrites, such as in upper case, with its own generation marks.

        Raises:
            RefusedRow: if it omits a turn, or does not mark an answer.
        """
        text, marks = self.jinja.render(messages)
        lower, at = text.lower(), 0
        for turn, message in enumerate(messages, 1):
            content = message[CONTENT].strip().lower()
            start = lower.find(content, at)
            at = start + len(content)
            inside = message["role"] != "assistant" or any(first <= start and at <= last for first, last in marks)
            if start < 0 or not inside:
                raise RefusedRow(
                    f"the tokenizer's chat template omits or rewrites turn {turn}, or does not mark it; use a model "
                    "whose chat template renders it, or remove the row"
                )
        return Rendered(text, self._with_ends(text, marks))

    def frame(self, shapes: tuple[Shape, ...], with_tools: bool, prompt: bool = False) -> Frame:
        """The frame of conversations with these shapes.

        Raises:
            RefusedRow: if the template omits a part of such conversations.
        """
        frame = self.cached(shapes, with_tools, prompt)
        if isinstance(frame, RefusedRow):
            raise RefusedRow(str(frame))
        return frame

    def _frame(self, shapes: tuple[Shape, ...], with_tools: bool, prompt: bool) -> Frame | RefusedRow:
        try:
            return self.maker.frame(shapes, with_tools, prompt)
        except RefusedRow as e:
            return e

    def _with_ends(self, text: str, marks: tuple[Span, ...]) -> tuple[Span, ...]:
        """The spans of generation marks, extended by end marks outside of them.

        The text after the last span is an end mark, unless it is white space, and is the end mark of every turn.
        """
        end_mark = text[marks[-1][1] :] if marks else ""
        if not end_mark.strip():
            return marks
        return tuple((start, end + self.maker.shared(end_mark, text[end:])) for start, end in marks)

    def _locate(
        self, text: str, messages: list[Message], tools: Tools, frame: Frame, prompt: bool = False
    ) -> Located | None:
        """Match the frame with the text; None if it does not fit."""
        pieces = frame.pieces
        if tools is not None or any(message.keys() & {"tool_calls", "tool_call_id"} for message in messages):
            stood_in = formed(with_stand_ins(messages), frame.form)
            pieces = pieces_of(self.jinja.render(stood_in, tools, prompt)[0])
            if not frame.fits(pieces):
                return None
        values = dict(fields(messages))
        forms = [_forms(values[field], messages[field.turn]["role"] == "tool") for field in pieces.fields]
        gaps = _matched(text, pieces.texts, forms)
        if gaps is None:
            return None
        starts, ends = [0, *(end for _, end in gaps)], [*(start for start, _ in gaps), len(text)]
        spans = (
            tuple(edge.at(starts[edge.piece], ends[edge.piece]) for edge in (speech.start, speech.end))
            for speech in frame.speeches
        )
        return Located(tuple(speech.turn for speech in frame.speeches), tuple((start, end) for start, end in spans))

    def _rewritten(self, text: str, messages: list[Message], tools: Tools) -> Located:
        """The spans if the template rewrites the last turn: that turn is everything after the generation prompt."""
        earlier, last = messages[:-1], messages[-1]
        frame = self.frame(shapes(earlier), tools is not None, prompt=True)
        before, _ = self.jinja.render(formed(earlier, frame.form), tools, prompt=True)
        located = self._locate(before, earlier, tools, frame, prompt=True)
        rewrites = located is None or not text.startswith(before) or len(before) == len(text)
        if located is None or rewrites or not all(_holds(text[len(before) :], part) for _, part in fields([last])):
            raise RefusedRow(
                "the tokenizer's chat template rewrites the turns, so the assistant's text cannot be located; "
                f"the last turn is {last['content'][:60]!r}"
            )
        return Located((*located.turns, len(earlier)), (*located.spans, (len(before), len(text))))


def _forms(value: str, is_of_tool: bool) -> list[str]:
    """Forms in which a template may write a value: without white space around it, and a tool's answer also as JSON."""
    strips = [strip(characters) for characters in (None, "\n") for strip in (value.strip, value.lstrip, value.rstrip)]
    escaped = [json.dumps(value, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True)] if is_of_tool else []
    return [value, *strips, *escaped]


def _matched(text: str, pieces: Sequence[str], values: Sequence[Sequence[str]]) -> list[Span] | None:
    """Spans of values, each in one of its forms, between pieces of a text; None if they do not fit."""
    if not text.startswith(pieces[0]):
        return None
    at, spans = len(pieces[0]), []
    for forms, following in zip(values, pieces[1:], strict=True):
        written = next((form for form in forms if text.startswith(form + following, at)), None)
        if written is None:
            return None
        spans.append((at, at + len(written)))
        at += len(written) + len(following)
    return spans if at == len(text) else None


def _holds(text: str, part: str) -> bool:
    """Whether all words of a part occur in a text in the same order."""
    at = 0
    for word in part.split():
        found = text.find(word, at)
        if found < 0:
            return False
        at = found + len(word)
    return True


def _marked(marks: tuple[Span, ...], located: Located) -> Located:
    """The generation marks, each with the turn that it belongs to."""
    pairs = [
        (turn, mark)
        for turn, (start, end) in zip(located.turns, located.spans, strict=True)
        for mark in marks
        if mark[0] < end and mark[1] > start
    ]
    if {turn for turn, _ in pairs} != {*located.turns}:
        raise RefusedRow("the chat template's generation marks do not include every assistant turn")
    return Located(tuple(turn for turn, _ in pairs), tuple(mark for _, mark in pairs))
