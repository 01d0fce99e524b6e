"""Conversations as chat templates take them, and the same with placeholders instead of their texts."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from finetune_assets.data.rows import Turn

STAND_IN = "\ue000{}.{}\ue001"
"""Placeholder for a text of a turn; characters of Unicode's private use area occur in no template."""
STAND_INS = re.compile("\ue000(\\d+)\\.(\\w+)\ue001")
PROBE = "\ue002{}\ue003"
"""Placeholder in tool definitions, and in arguments and ids of calls, whose form in the text is the template's own."""
PROBES = re.compile("\ue002[^\ue003]*\ue003")
CONTENT, REASONING, NAME, CALL = "content", "reasoning_content", "name", "call"

Message = dict[str, Any]


class Form(NamedTuple):
    """How a template takes tool calls.

    Attributes:
        no_content: Content of a turn that only calls tools.
        arguments_as_text: Whether arguments are JSON text instead of an object.
    """

    no_content: str | None = ""
    arguments_as_text: bool = False


FORMS = (Form(), Form(None), Form("", True), Form(None, True))
"""Forms in the order in which they are tried."""


class Field(NamedTuple):
    """A text of a turn.

    Attributes:
        turn: Index of the turn.
        name: `content`, `reasoning_content`, `name`, or `call` and the number of a tool call for the name of its tool.
    """

    turn: int
    name: str


class Shape(NamedTuple):
    """What a turn consists of; conversations with equal shapes have the same frame.

    Attributes:
        role: Role of the turn.
        content: Whether it has content.
        reasoning: Whether it has reasoning.
        name: Whether it has a name.
        answers: Number of the id of the call that it answers, if any.
        calls: For each tool call, whether it has arguments, and the number of its id.
    """

    role: str
    content: bool
    reasoning: bool = False
    name: bool = False
    answers: int | None = None
    calls: tuple[tuple[bool, int | None], ...] = ()


def parsed(turns: Sequence[Turn]) -> list[Message]:
    """The turns without their weights and empty keys, and with tool calls as objects."""
    messages = []
    for turn in turns:
        message = {key: value for key, value in turn.items() if value is not None and key != "weight"}
        if "tool_calls" in message:
            message["tool_calls"] = json.loads(message["tool_calls"])
        messages.append(message)
    return messages


def formed(messages: Sequence[Message], form: Form) -> list[Message]:
    """The messages with tool calls in the form that a template takes."""
    return [_formed(message, form) if "tool_calls" in message else message for message in messages]


def _formed(message: Message, form: Form) -> Message:
    calls = message["tool_calls"]
    if form.arguments_as_text:
        calls = [{**call, "function": _with_text(call["function"])} for call in calls]
    return {**message, "content": message["content"] or form.no_content, "tool_calls": calls}


def _with_text(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def fields(messages: Sequence[Message]) -> Iterator[tuple[Field, str]]:
    """The texts of the messages that are not blank, in the order of the turns."""
    for turn, message in enumerate(messages):
        for name in (REASONING, CONTENT, NAME):
            if message.get(name, "").strip():
                yield Field(turn, name), message[name]
        for number, call in enumerate(message.get("tool_calls", ())):
            yield Field(turn, f"{CALL}{number}"), call["function"]["name"]


def with_stand_ins(messages: Sequence[Message]) -> list[Message]:
    """The messages with placeholders instead of their texts; arguments and ids of tool calls remain."""
    return [_stood_in(turn, message) for turn, message in enumerate(messages)]


def _stood_in(turn: int, message: Message) -> Message:
    stood_in = dict(message)
    for name in (REASONING, CONTENT, NAME):
        if message.get(name, "").strip():
            stood_in[name] = STAND_IN.format(turn, name)
    if "tool_calls" in message:
        stood_in["tool_calls"] = [
            {**call, "function": {**call["function"], "name": STAND_IN.format(turn, f"{CALL}{number}")}}
            for number, call in enumerate(message["tool_calls"])
        ]
    return stood_in


def shapes(messages: Sequence[Message]) -> tuple[Shape, ...]:
    """The shapes of the messages."""
    numbers: dict[str, int] = {}

    def number(identifier: str | None) -> int | None:
        return None if identifier is None else numbers.setdefault(identifier, len(numbers))

    def calls(message: Message) -> tuple[tuple[bool, int | None], ...]:
        return tuple(
            (bool(call["function"]["arguments"]), number(call.get("id"))) for call in message.get("tool_calls", ())
        )

    return tuple(
        Shape(
            message["role"],
            bool(message["content"].strip()),
            bool(message.get(REASONING, "").strip()),
            bool(message.get(NAME, "").strip()),
            number(message.get("tool_call_id")),
            calls(message),
        )
        for message in messages
    )


def probes(shapes: Sequence[Shape]) -> list[Message]:
    """Messages of the given shapes, with placeholders for texts and arguments."""
    return [_probe(turn, shape) for turn, shape in enumerate(shapes)]


def _probe(turn: int, shape: Shape) -> Message:
    given = {CONTENT: shape.content, REASONING: shape.reasoning, NAME: shape.name}
    message: Message = {"role": shape.role, "content": ""}
    message |= {name: STAND_IN.format(turn, name) for name, has in given.items() if has}
    if shape.answers is not None:
        message["tool_call_id"] = _identifier(shape.answers)
    if shape.calls:
        message["tool_calls"] = [_probe_call(turn, number, *call) for number, call in enumerate(shape.calls)]
    return message


def _identifier(number: int) -> str:
    return PROBE.format(f"{number:07d}")  # templates of Mistral require nine characters


def _probe_call(turn: int, number: int, has_arguments: bool, identifier: int | None) -> dict[str, Any]:
    arguments = dict([probe_arguments(turn, number)]) if has_arguments else {}
    function = {"name": STAND_IN.format(turn, f"{CALL}{number}"), "arguments": arguments}
    call: dict[str, Any] = {"type": "function", "function": function}
    return call if identifier is None else {**call, "id": _identifier(identifier)}


def probe_arguments(turn: int, call: int) -> tuple[str, str]:
    """Key and value of the placeholder for the arguments of a tool call."""
    return PROBE.format(f"{turn}.{call}.key"), PROBE.format(f"{turn}.{call}.value")


TOOL_PROBES = (PROBE.format("tool"), PROBE.format("does"), PROBE.format("parameter"))
"""Name, description and parameter of the placeholder for tool definitions."""


def probe_tools() -> list[dict[str, Any]]:
    """A placeholder for tool definitions."""
    name, description, parameter = TOOL_PROBES
    schema = {
        "type": "object",
        "properties": {parameter: {"type": "string", "description": description}},
        "required": [parameter],
    }
    return [{"type": "function", "function": {"name": name, "description": description, "parameters": schema}}]
