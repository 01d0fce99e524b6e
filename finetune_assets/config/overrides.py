"""Places dotted settings in the schema, and reads the overrides of one run, such as `training.learning_rate=1e-4`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin

import yaml

from finetune_assets.config.errors import ConfigError, is_secret, shown, suggest
from finetune_assets.config.typed_yaml import NULLS, PLAIN, TypedReader, compose, hints_of, is_text, required_type

QUOTES = ("'", '"')
REFUSED = (
    "cannot be set for one run, because it decides what code runs or with which rights; write it in the experiment's "
    "file, configs/experiments/NAME.yaml"
)
"""Error of an override of a setting that is marked `IN_FILE_ONLY`."""


@dataclass(frozen=True)
class Place:
    """Where a dotted setting is in the tree.

    Attributes:
        keys: Names from the root. A name may contain dots: `lora.rank_pattern.layers.0.q_proj` is the value of
            `layers.0.q_proj` in `lora.rank_pattern`.
        hint: Type of the setting.
    """

    keys: tuple[str, ...]
    hint: Any

    def tree(self, value: Any) -> dict[str, Any]:
        """A tree with only this setting."""
        for name in reversed(self.keys):
            value = {name: value}
        tree: dict[str, Any] = value
        return tree


def place(schema: type, setting: str, where: str, value: str | None = None) -> Place:
    """Find a dotted setting.

    Args:
        schema: Dataclass of the settings.
        setting: The dotted name.
        where: File or override, for errors.
        value: The value as text, for errors.

    Raises:
        ConfigError: if the schema has no such setting.
    """
    keys: list[str] = []
    hint: Any = schema
    names = setting.split(".")
    for index, name in enumerate(names):
        required, _ = required_type(hint)
        if is_dataclass(required):
            hints = hints_of(required)  # type: ignore[arg-type]
            if name not in hints:
                path = ".".join(names[: index + 1])
                given = "" if value is None else f" (value {'hidden' if is_secret(name) else shown(value)})"
                raise ConfigError(where, path, f"unknown setting{given}; {suggest(name, hints)}")
            hint = hints[name]
        elif get_origin(required) is dict and get_args(required)[1] is not Any:
            return Place((*keys, _unquoted(".".join(names[index:]))), get_args(required)[1])
        elif get_origin(required) is dict or required is Any:
            hint = Any
        else:
            path = ".".join(names[:index])
            raise ConfigError(where, path, f"has no settings of its own, found '{setting}'; set {path}=VALUE")
        keys.append(name)
    return Place(tuple(keys), hint)


def _unquoted(name: str) -> str:
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in QUOTES else name


def read_override(schema: type, override: str, where: str) -> dict[str, Any]:
    """The tree of one override, `setting=value`.

    A text setting takes the text after `=` as it is, or in quotes as in YAML. Other values are YAML.

    Raises:
        ConfigError: if the setting is unknown or must be written in a file, or the value does not have its type.
    """
    setting, equals, text = override.partition("=")
    setting, text = setting.strip(), text.strip()
    if not equals or not setting:
        raise ConfigError(where, "", "expected key=value, such as training.learning_rate=1e-4")
    found = place(schema, setting, where, text)
    optional = required_type(found.hint)[1]
    if not is_text(found.hint) or text.startswith(QUOTES) or (optional and text in NULLS):
        node = _node(text, setting, where, quoted=is_text(found.hint) and text.startswith(QUOTES))
    else:
        tag = "tag:yaml.org,2002:str" if text not in NULLS or text == "" else PLAIN
        node = yaml.ScalarNode(tag, text)
    tree = found.tree(TypedReader(where).value(node, found.hint, setting))
    for refused in _in_file_only(schema, tree):
        raise ConfigError(where, refused, REFUSED)
    return tree


def _in_file_only(hint: Any, tree: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of the settings in a tree that must be written in a file."""
    required, _ = required_type(hint)
    if not isinstance(tree, dict):
        return
    if is_dataclass(required):
        hints = hints_of(required)  # type: ignore[arg-type]
        for setting in fields(required):
            if setting.name in tree and setting.metadata.get("in_file_only"):
                yield f"{path}{setting.name}"
            elif setting.name in tree:
                yield from _in_file_only(hints[setting.name], tree[setting.name], f"{path}{setting.name}.")
    elif get_origin(required) is dict:
        for name, value in tree.items():
            yield from _in_file_only(get_args(required)[1], value, f"{path}{name}.")


def _node(text: str, setting: str, where: str, quoted: bool) -> yaml.Node:
    advice = "put text with special characters in quotes, such as \"key='a: b # c'\""
    try:
        node = compose(text, where)
    except ConfigError as e:
        raise ConfigError(str(e), setting, advice) from e
    if node is None:
        raise ConfigError(where, setting, "no value after '='; write null to unset a setting that may be null")
    rest = text[node.end_mark.index :].strip()
    if rest or (quoted and not isinstance(node, yaml.ScalarNode)):
        raise ConfigError(where, setting, f"{rest!r} would be ignored as a comment; {advice}")
    return node
