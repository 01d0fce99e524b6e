"""Rows, and their assignment to splits by content."""

import hashlib
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from struct import unpack
from typing import Any, NamedTuple

from finetune_assets.config.schema import Data

Row = dict[str, Any]
"""One row of `RAW_SCHEMA`."""


class RowKind(StrEnum):
    """What a row teaches."""

    INSTRUCTION = "instruction"
    """One answer to learn."""
    PAIR = "pair"
    """A chosen answer and a rejected one."""
    LABELLED = "labelled"
    """An answer that is good or bad."""


Turn = dict[str, Any]
"""One turn of a conversation: `role` (system, user, assistant or tool) and `content`, which is empty if an assistant
turn only calls tools.

A turn may also have these keys; one that is missing or None has no value:

- `reasoning_content`: reasoning of an assistant turn.
- `tool_calls`: JSON list of the calls, each `{"type": "function", "function": {"name", "arguments"}, "id"}`,
  with the arguments as an object. The id may be missing.
- `tool_call_id`: id of the call that a tool turn answers.
- `name`: name of the speaker, or of the tool.
- `weight`: 0 if an assistant turn is not to be learned.
"""


def kind_of(row: Row) -> RowKind:
    """The kind of a row, by its columns `rejected` and `label`."""
    if row.get("rejected") is not None:
        return RowKind.PAIR
    return RowKind.INSTRUCTION if row.get("label") is None else RowKind.LABELLED


def rejected_side(row: Row) -> Row:
    """The instruction row of a pair's rejected answer; the pair itself is that of the chosen one."""
    return {**row, "response": row["rejected"], "messages": row["rejected_messages"]}


def texts_of(row: Row) -> list[str]:
    """All texts of a row: every value of its turns, or instruction, context and response, and the rejected answer."""
    turns = [str(value) for turn in row["messages"] or () for value in turn.values() if value]
    texts = turns or [row["instruction"], row["context"], row["response"]]
    return [*texts, *rejected_texts(row)]


def rejected_texts(row: Row) -> list[str]:
    """The texts of a pair's rejected answer: its turns, or the answer alone; none for other rows."""
    if row.get("rejected") is None:
        return []
    turns = [str(value) for turn in row["rejected_messages"] or () for value in turn.values() if value]
    return turns or [row["rejected"]]


class Split(StrEnum):
    """A split of the rows."""

    TRAIN = "train"
    VAL = "val"
    GATE = "gate"


class Draw(NamedTuple):
    """Two independent numbers in [0, 1) derived from a row's prompt.

    Attributes:
        side: Determines the row's split.
        rank: Order in which rows are chosen if only some are used.
    """

    side: float
    rank: float


def plain(text: str) -> str:
    """A text with case, spacing and Unicode form folded; equal for texts that differ in nothing else."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def draw(instruction: str, context: str, salt: str) -> Draw:
    """Derive a row's draw from its prompt, independently of all other rows.

    The response is excluded, and case, spacing and Unicode form are folded, so a duplicate or another answer to the
    same question is always in the same split. A conversation is identified by its system turn and first user turn, so
    a conversation that continues another one is in the same split.
    """
    text = "\0".join(plain(part) for part in (instruction, context))
    side, rank = unpack(">QQ", hashlib.blake2b(text.encode(), digest_size=16, key=salt.encode()[:64]).digest())
    return Draw(side / 2**64, rank / 2**64)


def side_of(draw: Draw, data: Data) -> Split:
    """The split of a row: the low end of [0, 1) is gate, the high end validation, so the fractions are independent."""
    if draw.side < data.gate_fraction:
        return Split.GATE
    return Split.VAL if draw.side >= 1 - data.val_fraction else Split.TRAIN


@dataclass(frozen=True)
class HoldoutRows:
    """Rows that an adapter and its warm-start ancestors were not trained on: both ends of [0, 1) of `Draw.side`.

    Attributes:
        salt: Salt of the draws.
        gate: Rows with a draw below this are unseen.
        val: Rows with a draw of at least 1 - `val` are unseen.
    """

    salt: str
    gate: float
    val: float

    def __and__(self, other: "HoldoutRows") -> "HoldoutRows":
        """Rows unseen by both; none if the salts differ, because each salt assigns all rows differently."""
        if other.salt != self.salt:
            return HoldoutRows(self.salt, 0.0, 0.0)
        return HoldoutRows(self.salt, min(self.gate, other.gate), min(self.val, other.val))

    def holds(self, instruction: str, context: str, split: str) -> bool:
        """Whether a row of a split is unseen."""
        side = draw(instruction, context, self.salt).side
        return side < self.gate if split == Split.GATE else side >= 1 - self.val
