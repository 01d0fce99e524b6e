"""Reads YAML as the types of the settings' schema: the type of a setting decides what a value is, not its spelling.

YAML 1.1 alone reads `0017` as 15, `off` as false, `12:00:00` as 43200, and `1e-4` as text. Here, a text setting keeps
the text as written, a number setting takes `1e-4`, and whatever does not fit its type is a `ConfigError`. So are
duplicate keys, tags, values that refer to themselves, and interpolation: settings are saved with every artifact, so
they must be literal.
"""

import math
import re
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import lru_cache
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from finetune_assets.config.errors import ConfigError, is_secret, shown, suggest

NULLS = ("", "~", "null", "Null", "NULL")
BOOLS = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}
"""YAML 1.1's words, in lower case; it accepts them in lower case, upper case and capitalized."""
INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]*[0-9a-fA-F][0-9a-fA-F_]*|0b[01_]*[01][01_]*)")
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
OCTAL = re.compile(r"[-+]?0[0-7_]+")
REAL = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.?(?:inf|infinity|nan)", re.IGNORECASE)
LARGEST = 2**63
TOO_DEEP = "not valid YAML: values are nested too deeply"
MOST_CHARACTERS = 1_000_000
"""Maximum size of a file of settings; reading takes a second for each million characters."""
MOST_LEVELS = 40
MOST_ITEMS = 10_000
"""Maximum length of a list or group; merging takes 0.2 ms for each of its values."""
MOST_VALUES = 100_000
"""Maximum number of values in a file, with aliases expanded."""
PLAIN = "plain"
"""Tag of a value without quotes and without a tag."""
CORE = "tag:yaml.org,2002:"
TAGS = {PLAIN, *(CORE + name for name in ("str", "int", "float", "bool", "null", "map", "seq"))}
EXPECTED = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list, such as [one, two]",
    dict: "names with values, such as {name: value}",
}


class _Loader(yaml.BaseLoader):  # type: ignore[misc]
    """Composes nodes without reading values. (libyaml's loader would crash the process on deeply nested text.)"""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return PLAIN
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


def read_document(schema: type, text: str, where: str, reader: "type[TypedReader] | None" = None) -> dict[str, Any]:
    """Read a file's settings as plain data of the schema's types; settings that are not written are absent.

    Raises:
        ConfigError: naming `where`, the setting or line, and the value.
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(where, "", f"{len(text):,} characters; a file of settings has at most {MOST_CHARACTERS:,}")
    node = compose(text, where)
    if node is None:
        return {}
    try:
        tree: dict[str, Any] = (reader or TypedReader)(where).value(node, schema, "")
    except RecursionError:
        raise ConfigError(where, "", TOO_DEEP) from None
    return tree


def compose(text: str, where: str) -> yaml.Node | None:
    """Parse YAML to nodes; None if it has no value.

    Raises:
        ConfigError: naming `where` and the line.
    """
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as e:
        line = f"line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(where, line, f"not valid YAML: {e.problem}") from e
    except (yaml.YAMLError, ValueError) as e:  # ValueError: "\U00110000", an escape beyond Unicode
        raise ConfigError(where, "", f"not valid YAML: {str(e).partition(chr(10))[0]}") from e
    except RecursionError:
        raise ConfigError(where, "", TOO_DEEP) from None
    return node


@lru_cache
def hints_of(schema: type) -> dict[str, Any]:
    """Types of a group's settings by name."""
    return get_type_hints(schema)


def group_of(hint: Any) -> type | None:
    """The dataclass in a field's type (also in `Wandb | None`), if any."""
    required, _ = required_type(hint)
    return required if is_dataclass(required) else None  # type: ignore[return-value]


def required_type(hint: Any) -> tuple[Any, bool]:
    """The type without `None`, and whether `None` is possible."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    options = [option for option in get_args(hint) if option is not types.NoneType]
    return options[0], len(options) < len(get_args(hint))


def is_text(hint: Any) -> bool:
    """Whether values of this type are text."""
    required, _ = required_type(hint)
    return required is str or get_origin(required) is Literal


class TypedReader:
    """Converts YAML nodes to plain data of the schema's types.

    Args:
        where: File or override, for errors.
    """

    def __init__(self, where: str) -> None:
        self.where, self._count, self._open = where, 0, list[yaml.Node]()

    def value(self, node: yaml.Node, hint: Any, key: str) -> Any:
        """The value of a node.

        Args:
            node: The YAML node.
            hint: Type of the setting.
            key: Dotted path of the setting.

        Raises:
            ConfigError: if the value does not have this type.
        """
        self._counted(key)
        if node.tag not in TAGS:
            self.refuse(key, f"YAML tag {shown(node.tag)} on line {_line(node)} is not supported; write a plain value")
        if any(node is outer for outer in self._open):
            self.refuse(key, f"the alias on line {_line(node)} refers to the value that contains it")
        if len(self._open) >= MOST_LEVELS:
            self.refuse(".".join(key.split(".")[:3]), f"more than {MOST_LEVELS} levels of values")
        self._open.append(node)
        required, optional = required_type(hint)
        result: Any
        if is_dataclass(required):
            result = self._group(node, required, optional, key)
        elif required is Any:
            result = self._any(node, key)
        elif optional and _is_null(node):
            result = None
        elif get_origin(required) is list:
            (item,) = get_args(required)
            result = [self.value(child, item, key) for child in self._items(node, key)]
        elif get_origin(required) is dict:
            result = self._named(node, get_args(required)[1], key)
        else:
            result = self._scalar(node, required, key)
        self._open.pop()
        return result

    def refuse(self, key: str, problem: str) -> NoReturn:
        raise ConfigError(self.where, key, problem)

    def _counted(self, key: str) -> None:
        self._count += 1
        if self._count > MOST_VALUES:
            self.refuse(key, f"more than {MOST_VALUES:,} values, with aliases expanded")

    def item_type(self, hint: Any, key: str, name: str, node: yaml.Node) -> Any:
        """Type of the value `name` in the setting `key`, which has values of type `hint` by name."""
        return hint

    # ---- groups, lists, and values by name

    def _group(self, node: yaml.Node, schema: Any, optional: bool, key: str) -> dict[str, Any] | None:
        if _is_null(node):
            if node.value == "":
                return {}  # all its lines may be commented out
            if optional:
                return None
            self.refuse(key, "null is not possible for this group; remove the line to use the defaults")
        if not isinstance(node, yaml.MappingNode):
            self.refuse(key, f"expected a group of settings, `name: value`, found {self._found(node)}")
        hints, tree = hints_of(schema), {}
        for name, child in self._pairs(node, key):
            path = f"{key}.{name}" if key else name
            if name not in hints:
                found = "hidden" if is_secret(name) else self._found(child)
                self.refuse(path, f"unknown setting (value {found}); {suggest(name, hints)}")
            if not (_is_unset(child) and get_origin(hints[name]) in (list, dict)):
                tree[name] = self.value(child, hints[name], path)
        return tree

    def _named(self, node: yaml.Node, hint: Any, key: str) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            self._wrong_type(node, dict, key)
        self._check_length(node, key)
        pairs = ((name, child, f"{key}.{name}") for name, child in self._pairs(node, key))
        return {name: self.value(child, self.item_type(hint, key, name, child), path) for name, child, path in pairs}

    def _items(self, node: yaml.Node, key: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self._wrong_type(node, list, key)
        self._check_length(node, key)
        return list(node.value)

    def _check_length(self, node: yaml.Node, key: str) -> None:
        if len(node.value) > MOST_ITEMS:
            self.refuse(key, f"{len(node.value):,} values; a list or group has at most {MOST_ITEMS:,}")

    def _pairs(self, node: yaml.MappingNode, key: str) -> Iterator[tuple[str, yaml.Node]]:
        """Names and values; names are text as written. Values of a merge key (`<<`) follow, unless they are set."""
        lines: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for name_node, child in node.value:
            if not isinstance(name_node, yaml.ScalarNode) or (name_node.tag == PLAIN and name_node.value == ""):
                self.refuse(key, f"line {_line(name_node)}: a name must be text")
            if name_node.tag not in TAGS:
                self.refuse(key, f"line {_line(name_node)}: YAML tag {shown(name_node.tag)} is not supported")
            if name_node.tag == PLAIN and name_node.value == "<<":
                merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
                continue
            name = self.literal(name_node.value, key)
            if name in lines:
                path = f"{key}.{name}" if key else name
                self.refuse(path, f"set twice, on line {lines[name]} and line {_line(name_node)}; remove one")
            lines[name] = _line(name_node)
            yield name, child
        for source in merged:
            if not isinstance(source, yaml.MappingNode) or any(source is outer for outer in self._open):
                self.refuse(key, f"line {_line(source)}: `<<` requires a group that is defined before it")
            self._counted(key)
            self._open.append(source)
            for name, child in self._pairs(source, key):
                if name not in lines:
                    lines[name] = _line(source)
                    yield name, child
            self._open.remove(source)

    # ---- single values

    def _scalar(self, node: yaml.Node, kind: Any, key: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            self._wrong_type(node, kind, key)
        text = self.literal(node.value, key)
        if get_origin(kind) is Literal:
            if text not in (options := get_args(kind)):
                self.refuse(key, f"{shown(text)} is not valid; {suggest(text, options)}")
            return text
        if _is_null(node) and text == "":
            self.refuse(key, f"no value; write {EXPECTED[kind]}, or remove the line to use the default")
        if _is_null(node):
            quotes = f", or '{text}' in quotes" if kind is str else ""
            self.refuse(key, f"{text} is not possible here; write {EXPECTED[kind]}{quotes}")
        if kind is str:
            return text
        value: bool | int | float | None
        if kind is bool:
            value = {**BOOLS, "1": True, "0": False}.get(text.lower())
        else:
            value = self._number(text, key, kind is float)
        return self._wrong_type(node, kind, key) if value is None else value

    def _any(self, node: yaml.Node, key: str) -> Any:
        """A value without a type in the schema, as YAML 1.1 reads it, but for dates and numbers in base 60: text."""
        if isinstance(node, yaml.MappingNode):
            return self._named(node, Any, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, Any, key) for child in node.value]
        text = self.literal(node.value, key)
        if node.tag == CORE + "str":
            return text
        if text in NULLS:
            return None
        if text.lower() in BOOLS and text in (text.lower(), text.upper(), text.capitalize()):
            return BOOLS[text.lower()]
        if OCTAL.fullmatch(text):
            return self._bounded(int(text.replace("_", ""), 8), key)
        if LEADING_ZERO.fullmatch(text) or (NOT_FINITE.fullmatch(text) and "." not in text):
            return text
        value = self._number(text, key, real=True)
        return text if value is None else value

    def _number(self, text: str, key: str, real: bool) -> int | float | None:
        """The number in a text; None if it is none."""
        if LEADING_ZERO.fullmatch(text):
            self.refuse(key, f"{text} has a leading zero, which YAML reads as base 8; write the number without it")
        if INTEGER.fullmatch(text):
            digits = text.replace("_", "").lower()
            return self._bounded(int(digits, 0) if len(digits) < 80 else LARGEST, key)
        if not real:
            return None
        finite = REAL.fullmatch(text)
        number = float(text.replace("_", "")) if finite else None
        if NOT_FINITE.fullmatch(text) or (number is not None and not math.isfinite(number)):
            self.refuse(key, f"{shown(text)} must be a finite number")
        return number

    def _bounded(self, number: int, key: str) -> int:
        if not -LARGEST <= number < LARGEST:
            self.refuse(key, "the number has more than 64 bits")
        return number

    def literal(self, text: str, key: str) -> str:
        """The text, if it can be saved as it is and read again."""
        if "${" in text:
            self.refuse(key, f"{shown(text)} must be literal and not hold '${{': it is saved with every artifact")
        if "\0" in text:
            self.refuse(key, f"{shown(text)} contains a NUL character")
        try:
            text.encode()
        except UnicodeEncodeError:
            self.refuse(key, f"{shown(text)} contains half of a character (a surrogate); write the character itself")
        return text

    def _wrong_type(self, node: yaml.Node, kind: Any, key: str) -> NoReturn:
        if get_origin(kind) is Literal:
            self.refuse(key, f"{self._found(node)} is not valid; {suggest('', get_args(kind))}")
        found, hint = self._found(node), ""
        if kind is int and isinstance(node, yaml.ScalarNode) and REAL.fullmatch(node.value):
            number = float(node.value.replace("_", ""))
            hint = f"; write {number:.0f}" if number.is_integer() else ""
        self.refuse(key, f"{found} has the wrong type: expected {EXPECTED[kind]}{hint}")

    def _found(self, node: yaml.Node) -> str:
        """A node's value for an error, without aliases' values."""
        return shown(_outline(node))


def _outline(node: yaml.Node, depth: int = 3) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if depth == 0:
        return "..."
    if isinstance(node, yaml.SequenceNode):
        return [_outline(child, depth - 1) for child in node.value[:10]]
    pairs = node.value[:10]
    return {str(_outline(name, 0)): _outline(child, depth - 1) for name, child in pairs}


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag in (PLAIN, CORE + "null") and node.value in NULLS


def _is_unset(node: yaml.Node) -> bool:
    """Whether nothing is written after the colon, as when all lines of a list or group are commented out."""
    return _is_null(node) and node.value == ""


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
