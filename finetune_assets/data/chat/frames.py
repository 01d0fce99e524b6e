"""Frames: the text that a template writes around the texts of turns with given shapes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune_assets.data.chat.jinja import Jinja
from finetune_assets.data.chat.messages import (
    CONTENT,
    FORMS,
    NAME,
    PROBES,
    REASONING,
    STAND_IN,
    STAND_INS,
    TOOL_PROBES,
    Field,
    Form,
    Message,
    Shape,
    fields,
    formed,
    probe_arguments,
    probe_tools,
    probes,
)
from finetune_assets.data.chat.rendered import Span
from finetune_assets.data.errors import RefusedRow

UNFINISHED_MARK = re.compile(r"[<\[][^<>\[\]\s]*$")
"""Pattern of the beginning of a mark such as `<|user|>` or `[INST]`."""


class Pieces(NamedTuple):
    """A text with placeholders, divided at the placeholders.

    Attributes:
        texts: Text before the first placeholder, between placeholders, and after the last; one more than placeholders.
        fields: The field of each placeholder.
    """

    texts: tuple[str, ...]
    fields: tuple[Field, ...]


def pieces_of(text: str) -> Pieces:
    """Divide a text at its placeholders."""
    parts = STAND_INS.split(text)
    named = zip(parts[1::3], parts[2::3], strict=True)
    return Pieces(tuple(parts[::3]), tuple(Field(int(turn), name) for turn, name in named))


class Edge(NamedTuple):
    """A position in a piece of text, by its distance from the piece's start or end.

    Attributes:
        piece: Index of the piece.
        left: Number of characters before the position; None if it varies with arguments of tool calls.
        right: Number of characters after it; None if it varies. At least one of the two is known.
    """

    piece: int
    left: int | None
    right: int | None

    def at(self, start: int, end: int) -> int:
        """The position in a text in which the piece has this span."""
        return end - self.right if self.left is None else start + self.left  # type: ignore[operator]


class Speech(NamedTuple):
    """An assistant turn in a frame.

    Attributes:
        turn: Index of the turn.
        first: Index of its first placeholder.
        last: Index of its last placeholder.
        start: Where its text to learn begins.
        end: Where it ends, after the end mark.
    """

    turn: int
    first: int
    last: int
    start: Edge
    end: Edge


@dataclass(frozen=True)
class Frame:
    """Text that a template writes around turns with given shapes.

    Attributes:
        pieces: The text, divided at the placeholders of the turns' texts.
        form: How the template takes tool calls.
        speeches: The assistant turns.
        omitted: Parts of the conversation that the template does not render although nothing to learn is lost.
    """

    pieces: Pieces
    form: Form
    speeches: tuple[Speech, ...]
    omitted: tuple[str, ...]

    def fits(self, other: Pieces) -> bool:
        """Whether the pieces of a conversation differ from the frame's only in tool definitions and arguments."""
        if other.fields != self.pieces.fields:
            return False
        edges = (edge for speech in self.speeches for edge in (speech.start, speech.end))
        return all(_same_side(self.pieces.texts[edge.piece], other.texts[edge.piece], edge) for edge in edges)


def _same_side(ours: str, other: str, edge: Edge) -> bool:
    if edge.left is not None:
        return ours[: edge.left] == other[: edge.left]
    assert edge.right is not None
    return ours[len(ours) - edge.right :] == other[len(other) - edge.right :]


class OmittedContent(RefusedRow):
    """A row of which the template omits a part.

    Args:
        message: The reason.
        stage: How much the template renders: 1 if texts are missing, 2 if arguments are, 3 if tool definitions are. Of
            several forms of tool calls, the problem of the one that the template renders best is reported.
    """

    def __init__(self, message: str, stage: int) -> None:
        super().__init__(message)
        self.stage = stage


class FrameMaker:
    """Makes the frames of a template.

    Args:
        jinja: The template.
        marks: Texts of the tokenizer's added tokens.
    """

    def __init__(self, jinja: Jinja, marks: Sequence[str]) -> None:
        self.jinja, self.marks = jinja, tuple(marks)

    def frame(self, shapes: tuple[Shape, ...], with_tools: bool, prompt: bool = False) -> Frame:
        """The frame of conversations with these shapes.

        Args:
            shapes: Shapes of the turns.
            with_tools: Whether the conversation has tool definitions.
            prompt: Whether a further turn of the assistant is to follow.

        Raises:
            RefusedRow: if the template omits content in every form of tool calls.
        """
        problems: list[RefusedRow] = []
        for form in FORMS if any(shape.calls for shape in shapes) else FORMS[:1]:
            try:
                return self._frame(shapes, with_tools, prompt, form)
            except RefusedRow as e:
                problems.append(e)
        raise max(problems, key=lambda problem: problem.stage if isinstance(problem, OmittedContent) else 0)

    def _frame(self, shapes: tuple[Shape, ...], with_tools: bool, prompt: bool, form: Form) -> Frame:
        messages, tools = probes(shapes), probe_tools() if with_tools else None
        text, marks = self.jinja.render(formed(messages, form), tools, prompt)
        if form.no_content is None and "None" in text and "None" not in self.jinja.template:
            raise RefusedRow("the tokenizer's chat template writes 'None' for a turn without content")
        pieces = pieces_of(text)
        omitted = tuple(dict.fromkeys(_omitted(text, pieces, messages, with_tools, prompt)))
        speeches = tuple(
            self._speech(turn, messages, tools, pieces, form)
            for turn, shape in enumerate(shapes)
            if shape.role == "assistant"
        )
        if self.jinja.marked:
            _check_marks(text, marks, messages)
        return Frame(pieces, form, speeches, omitted)

    def _speech(
        self, turn: int, messages: list[Message], tools: list[dict[str, Any]] | None, pieces: Pieces, form: Form
    ) -> Speech:
        """Locate an assistant turn by rendering the conversation up to it, and up to its generation prompt."""

        def rendered(until: list[Message], prompt: bool = False) -> Pieces:
            return pieces_of(self.jinja.render(formed(until, form), tools, prompt)[0])

        own = rendered(messages[: turn + 1])
        written = [field for field in own.fields[_first(own, turn) :] if field in pieces.fields]
        first = _first(pieces, turn)
        last = first + len(written) - 1
        if list(pieces.fields[first : last + 1]) != written or not written:
            raise RefusedRow(f"the tokenizer's chat template writes turn {turn + 1} in parts, so it cannot be located")
        following, tail = pieces.texts[last + 1], own.texts[-1]
        shared = self.shared(tail, following)
        if shared < len(tail):  # the template ends the last turn differently
            asked, prompted, answered = (
                rendered(messages[:until], prompt).texts[-1]
                for until, prompt in ((turn, False), (turn, True), (turn + 1, True))
            )
            header = prompted.removeprefix(asked)
            if asked != prompted and answered.endswith(header):
                shared = max(shared, self.shared(answered.removesuffix(header), following))
        if any(found.end() > shared for found in PROBES.finditer(tail)):
            raise RefusedRow(f"the tokenizer's chat template rewrites the tool calls of turn {turn + 1}")
        end = _edge(last + 1, following, shared)
        spoken = first + next((i for i, field in enumerate(written) if field.name != NAME), 0)
        start = Edge(spoken, None, 0)
        if "tool_calls" in messages[turn] or Field(turn, REASONING) in written:
            start = self._start(turn, messages, rendered, pieces, spoken)
        return Speech(turn, first, last, start, end)

    def _start(self, turn: int, messages: list[Message], rendered: Any, pieces: Pieces, first: int) -> Edge:
        """Where a turn begins that does not begin with its content: after the generation prompt."""
        before = rendered(messages[:turn], True)
        if before == rendered(messages[:turn]):  # without a generation prompt, the text before content is the header
            answer = {"role": "assistant", "content": STAND_IN.format(turn, CONTENT)}
            plain = rendered([*messages[:turn], answer])
            at = plain.fields.index(Field(turn, CONTENT))
            before = Pieces(plain.texts[: at + 1], plain.fields[:at])
        if before.fields[-1:] != pieces.fields[:first][-1:]:
            raise RefusedRow(f"the tokenizer's chat template rewrites the turns before turn {turn + 1}")
        return _edge(first, pieces.texts[first], self.shared(before.texts[-1], pieces.texts[first]))

    def shared(self, own: str, other: str) -> int:
        """Length of the text that both begin with, without a part of a mark that only one of them continues."""
        shared = next((i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), len(own))
        shared = min(shared, len(other))
        if shared == len(own):
            return shared
        for mark in self.marks:
            start = other.rfind(mark, max(0, shared - len(mark) + 1), shared + len(mark) - 1)
            if 0 <= start < shared < start + len(mark):
                return start
        unfinished = UNFINISHED_MARK.search(other[:shared])
        return unfinished.start() if unfinished else shared


def _first(pieces: Pieces, turn: int) -> int:
    return next((i for i, field in enumerate(pieces.fields) if field.turn == turn), len(pieces.fields))


def _edge(piece: int, text: str, position: int) -> Edge:
    left = None if PROBES.search(text[:position]) else position
    right = None if PROBES.search(text[position:]) else len(text) - position
    if left is None and right is None:
        raise RefusedRow("the tokenizer's chat template writes tool calls on both sides of a turn's end")
    return Edge(piece, left, right)


def _omitted(text: str, pieces: Pieces, messages: list[Message], with_tools: bool, prompt: bool) -> Iterator[str]:
    """Parts that the template omits although nothing to learn is lost.

    Raises:
        RefusedRow: if it omits anything else.
    """
    written, last = {*pieces.fields}, len(messages) - 1
    for field, _ in fields(messages):
        if field in written:
            continue
        if field.name == NAME:
            yield f"name of a turn with role {messages[field.turn]['role']}"
        elif field.name == REASONING and (prompt or field.turn != last):
            yield "reasoning of earlier turns"
        else:
            kind = {CONTENT: "content", REASONING: "reasoning"}.get(field.name, "tool calls")
            raise _loses(f"the {kind} of turn {field.turn + 1} ({messages[field.turn]['role']})", 1)
    for turn, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls", ())):
            key, value = probe_arguments(turn, number)
            if str({key: value}) in text:
                raise OmittedContent(
                    f"the tokenizer's chat template writes the arguments of the tool calls of turn {turn + 1} in "
                    "Python's notation instead of JSON; use a model with another chat template",
                    2,
                )
            if call["function"]["arguments"] and not (key in text and value in text):
                raise _loses(f"the arguments of the tool calls of turn {turn + 1}", 2)
    if with_tools and any(probe not in text for probe in TOOL_PROBES):
        raise _loses("the tool definitions ('tools')", 3)


def _loses(what: str, stage: int) -> OmittedContent:
    advice = "use a model whose chat template renders it, or remove it from the source"
    return OmittedContent(f"the tokenizer's chat template omits {what}; {advice}", stage)


def _check_marks(text: str, marks: tuple[Span, ...], messages: list[Message]) -> None:
    """Check that generation marks include all text of the assistant turns.

    Raises:
        RefusedRow: naming the turn.
    """

    def marked(part: str) -> bool:
        return part not in text or any(part in text[first:last] for first, last in marks)

    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        parts = [message[name] for name in (CONTENT, REASONING) if message.get(name)]
        for number, call in enumerate(message.get("tool_calls", ())):
            parts += [*probe_arguments(turn, number), call["function"]["name"]]
        if not all(map(marked, parts)):
            raise RefusedRow(f"the chat template's generation marks do not include all of turn {turn + 1}")
