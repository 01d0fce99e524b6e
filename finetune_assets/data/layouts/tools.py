"""Tool definitions and tool calls of conversations, converted to JSON texts in OpenAI's form."""

import json
from collections import Counter
from typing import Any, NoReturn

from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.values import shortened, utf8

OUTER_KEYS, INNER_KEYS = {"type", "function", "id", "index"}, {"name", "arguments", "parameters"}
"""Keys of a tool call and of its `function` whose content is kept, or that only number it (`index`)."""
CALL_KEYS = OUTER_KEYS | INNER_KEYS
"""Keys of a call without `function`."""
NULLABLE = ("default", "const")
"""Keys of a JSON schema for which null is a value."""
MAX_LEVELS = 100
"""Levels of lists and objects inside of each other in definitions and calls, which are read again in later steps."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that carry no content."""


def tool_definitions(value: Any) -> str | None:
    """The tools that a row offers, as a JSON list of `{"type": "function", "function": {...}}`.

    Args:
        value: A list of definitions in OpenAI's form or bare (`{"name": ..., "parameters": ...}`), or its JSON text.

    Raises:
        BadRow: if it is something else.
    """
    value = from_json(value, "'tools'")
    if value in EMPTY:
        return None
    if not isinstance(value, list):
        raise BadRow(f"'tools' must be a list of tool definitions, found {shortened(value)}")
    return _text([_definition(tool, f"tool {number}") for number, tool in enumerate(value, 1)], "'tools'")


def _definition(tool: Any, where: str) -> dict[str, Any]:
    tool = from_json(tool, where)
    if not isinstance(tool, dict):
        raise BadRow(f"{where} must be an object with a name, found {shortened(tool)}")
    wrapped = tool.get("function") is not None
    kind, function = tool.get("type"), tool["function"] if wrapped else tool
    if kind not in (*EMPTY, "function"):
        raise BadRow(f"{where} has type {shortened(kind)}; only functions are supported")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow(f"{where} has no function with a name; found {shortened(tool)}")
    if wrapped:
        return _without_nulls({**tool, "type": "function"})
    return {"type": "function", "function": _without_nulls({key: tool[key] for key in tool if key != "type"})}


def _without_nulls(schema: Any) -> Any:
    """A definition without keys that are null, which Parquet adds where the definitions of a column differ."""
    if isinstance(schema, list):
        return [_without_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _without_nulls(item) for key, item in schema.items() if item is not None or key in NULLABLE}


def tool_calls(value: Any, where: str) -> str | None:
    """The calls of an assistant turn as a JSON list, with the arguments as objects.

    Args:
        value: A list of calls in OpenAI's form or bare (`{"name": ..., "arguments": ...}`), one call, or JSON text.
        where: Name of the turn and key in messages.

    Raises:
        BadRow: if a call has no name, arguments that are not an object, or unknown keys with content.
    """
    value = from_json(value, where)
    if value in EMPTY:
        return None
    calls = value if isinstance(value, list) else [value]
    return _text([_call(call, where) for call in calls], where)


def _call(call: Any, where: str) -> dict[str, Any]:
    call = from_json(call, where)
    if not isinstance(call, dict):
        raise BadRow(f"{where}: a call must be an object with name and arguments, found {shortened(call)}")
    kind, function = call.get("type"), call if call.get("function") is None else call["function"]
    if kind not in (*EMPTY, "function") or not isinstance(function, dict):
        raise BadRow(f"{where}: a call must be of type 'function', found {shortened(call)}")
    wrapped = function is not call
    for part, known in ((call, OUTER_KEYS if wrapped else CALL_KEYS), (function, INNER_KEYS if wrapped else CALL_KEYS)):
        for key, value in part.items():
            if key not in known and value not in EMPTY:
                raise BadRow(f"{where}: '{key}' of a call would be lost; found {shortened(value)}")
    name, identifier = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name.strip():
        raise BadRow(f"{where}: a call has no name; found {shortened(call)}")
    if not isinstance(identifier, str | None):
        raise BadRow(f"{where}: the id of a call must be text, found {shortened(identifier)}")
    arguments = {"type": "function", "function": {"name": name, "arguments": _arguments(function, name, where)}}
    return {**arguments, "id": identifier} if identifier else arguments


def _arguments(function: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    given = [function[key] for key in ("arguments", "parameters") if function.get(key) not in EMPTY]
    if len(given) > 1:
        raise BadRow(f"{where}: 'arguments' and 'parameters' of '{name}' both have a value, and one would be lost")
    arguments = from_json(given[0], f"{where}: arguments of '{name}'") if given else {}
    if not isinstance(arguments, dict):
        raise BadRow(f"{where}: arguments of '{name}' must be an object, found {shortened(arguments)}")
    return arguments


def from_json(value: Any, where: str) -> Any:
    """The value of a JSON text; any other value as it is.

    Raises:
        BadRow: if a text is not JSON, or has a key twice.
    """
    if not isinstance(value, str) or not value.strip():
        return "" if isinstance(value, str) else value
    try:
        return json.loads(value, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise BadRow(f"{where} is not JSON: {e}; found {shortened(value)}") from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key '{twice}' occurs twice")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _text(values: list[dict[str, Any]], where: str) -> str:
    _check_levels(values, where)
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise BadRow(f"{where} cannot be written as JSON: {e}") from e
    return utf8(text, where)


def _check_levels(values: Any, where: str) -> None:
    level = [values]
    for _ in range(MAX_LEVELS):
        parts = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
        if not level:
            return
    raise BadRow(f"{where}: more than {MAX_LEVELS} levels of values")
