"""Keys of a turn beside role and content: weights, reasoning, names, metadata, and keys that are refused."""

import re
from collections.abc import Mapping
from typing import Any

from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.tools import EMPTY
from finetune_assets.data.layouts.values import shortened, utf8

TEXT_KEYS = ("role", "from", "content", "value", "tool_calls", "function_call")
NAME_KEYS = ("name", "tool_call_id")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
WEIGHT_KEYS = ("weight", "loss_weight", "loss_scale", "loss_mask", "loss", "train", "training", "trainable")
"""Keys that are 0 or false if a turn is not to be learned, in the spellings of OpenAI, ms-swift and axolotl."""
TRAINED_ROLE_KEYS = ("train", "training", "trainable")
"""Those of `WEIGHT_KEYS` that axolotl also takes as a request to learn a turn that is not the assistant's."""
AMBIGUOUS_KEYS = ("mask", "masked", "masking")
"""Keys that mean learned in some formats and not learned in others."""
MEDIA = re.compile(r"(input_)?(image|audio|video|file|attachment)s?(_.*)?")
"""Pattern of keys that hold or name content other than text."""
METADATA = re.compile(
    r"(.*_)?(id|ids|uuid|guid|identifier|index|idx|number|hash|sha|ip|timestamp|time|date|datetime|created|updated"
    r"|deleted|redacted|created_at|updated_at|create_time|update_time|tokens|token_count|count|length|language|lang"
    r"|locale|country|model|model_name|score|scores|rating|rank|toxic|toxicity|synthetic|status|state|metadata|meta"
    r"|header|headers|end_turn|stop_reason|finish_reason|cache_control|source|dataset|license)"
)
"""Pattern of keys that identify or describe a turn. They are passed over; `ignored_keys` lists them."""


def weight_of(turn: Mapping[str, Any], role: str, where: str) -> float | None:
    """0 if the turn is not to be learned; None otherwise.

    Raises:
        BadRow: if a weight is neither 0 nor 1, weights contradict each other, or a turn that is not the assistant's is
            to be learned.
    """
    weights: dict[str, float] = {}
    for key in (*WEIGHT_KEYS, *AMBIGUOUS_KEYS):
        value = turn.get(key)
        if value is None:
            continue
        if key in AMBIGUOUS_KEYS:
            raise BadRow(f"{where}: '{key}' is ambiguous; write 'weight': 0 for a turn that is not learned, else 1")
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRow(f"{where}: '{key}' must be 0 or 1 (not learned, learned), found {shortened(value)}")
        if role != "assistant" and value and key in TRAINED_ROLE_KEYS:
            raise BadRow(f"{where}: '{key}' is true, but only assistant turns are learned, not {role} turns; remove it")
        weights[key] = float(value)
    if len({*weights.values()}) > 1:
        raise BadRow(f"{where}: {shortened(weights)} contradict each other; keep one of them")
    return 0.0 if role == "assistant" and 0.0 in weights.values() else None


def reasoning_of(turn: Mapping[str, Any], role: str, where: str) -> str | None:
    """The turn's reasoning, if any.

    Raises:
        BadRow: if it is not text, is given twice, or is not the assistant's.
    """
    values = {key: turn[key] for key in REASONING_KEYS if turn.get(key) not in EMPTY}
    if not values:
        return None
    (key, text), *others = values.items()
    if any(other != text for _, other in others):
        raise BadRow(f"{where}: '{key}' and '{others[0][0]}' both have a value, and one would be lost")
    if not isinstance(text, str):
        raise BadRow(f"{where}: '{key}' must be text, found {shortened(text)}")
    if role != "assistant" and text.strip():
        raise BadRow(f"{where}: '{key}' would be lost; only assistant turns have reasoning")
    return utf8(text, f"{where}: '{key}'") if text.strip() else None


def names_of(turn: Mapping[str, Any], where: str) -> dict[str, str]:
    """The turn's `name` and `tool_call_id`, as far as it has them.

    Raises:
        BadRow: if one of them is not text.
    """
    names = {key: turn[key] for key in NAME_KEYS if turn.get(key) not in EMPTY}
    for key, name in names.items():
        if not isinstance(name, str):
            raise BadRow(f"{where}: '{key}' must be text, found {shortened(name)}")
        utf8(name, f"{where}: '{key}'")
    return {key: name for key, name in names.items() if name.strip()}


def check_keys(turn: Mapping[str, Any], where: str) -> None:
    """Check that no key with content would be lost.

    Raises:
        BadRow: naming the key and its value.
    """
    known = (*TEXT_KEYS, *NAME_KEYS, *REASONING_KEYS, *WEIGHT_KEYS, *AMBIGUOUS_KEYS)
    for key, value in turn.items():
        if key in known or value in EMPTY:
            continue
        if MEDIA.fullmatch(str(key)):
            raise BadRow(f"{where}: '{key}' holds images, audio or files; only text is supported")
        if not METADATA.fullmatch(str(key)):
            raise BadRow(f"{where}: '{key}' would be lost; found {shortened(value)}. Remove it from the turns")


def ignored_keys(turn: Mapping[str, Any]) -> list[str]:
    """The turn's keys that are passed over although they have a value."""
    return [
        str(key)
        for key, value in turn.items()
        if METADATA.fullmatch(str(key))
        and not MEDIA.fullmatch(str(key))
        and key not in NAME_KEYS
        and value not in EMPTY
    ]
