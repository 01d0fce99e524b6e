"""The one schema of raw data, the identity of a row, and the side of the split that it falls on."""

import hashlib
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from struct import unpack
from typing import Any, NamedTuple

import pyarrow as pa

from finetune_assets.config.schema import Data

TURN = pa.struct([pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)])
RAW_SCHEMA = pa.schema(
    [
        pa.field(
            "instruction",
            pa.string(),
            nullable=False,
            metadata={"doc": "what is asked; never blank. Of a conversation, the first user turn, if any"},
        ),
        pa.field(
            "context",
            pa.string(),
            nullable=False,
            metadata={"doc": "text to answer from; may be empty. Of a conversation, its system turn"},
        ),
        pa.field(
            "response",
            pa.string(),
            nullable=False,
            metadata={"doc": "the answer to learn; never blank. Of a conversation, the last assistant turn"},
        ),
        pa.field("category", pa.string(), nullable=False, metadata={"doc": "kind of task; may be empty"}),
        pa.field(
            "messages",
            pa.list_(pa.field("item", TURN, nullable=False)),
            metadata={
                "doc": "every turn of a conversation in order, system turn included, as role (system, user, assistant) "
                "and content; null where instruction and response are all there is"
            },
        ),
    ]
)
Row = dict[str, Any]
"""One row of `RAW_SCHEMA`."""
Turn = dict[str, str]
"""`role` and `content`."""


class Split(StrEnum):
    """A side of the split."""

    TRAIN = "train"
    VAL = "val"
    GATE = "gate"


class Draw(NamedTuple):
    """Two independent numbers in [0, 1) that a row's prompt decides.

    Attributes:
        side: Where on the line of the split the row stands.
        rank: The row's place in the queue when only some are taken.
    """

    side: float
    rank: float


def draw(instruction: str, context: str, salt: str) -> Draw:
    """What a row's prompt decides about it, whatever other rows there are.

    The response is left out and case, spacing and Unicode form are folded, so that neither a duplicate nor another
    answer to the same question can stand on the other side of the split. A conversation is decided by its system and
    first user turn, so that one that goes on from another stands where that one does.
    """
    text = "\0".join(
        " ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in (instruction, context)
    )
    side, rank = unpack(">QQ", hashlib.blake2b(text.encode(), digest_size=16, key=salt.encode()[:64]).digest())
    return Draw(side / 2**64, rank / 2**64)


def side_of(draw: Draw, data: Data) -> Split:
    """The gate's rows stand at the line's beginning, the validation rows at its end, so neither moves the other."""
    if draw.side < data.gate_fraction:
        return Split.GATE
    return Split.VAL if draw.side >= 1 - data.val_fraction else Split.TRAIN


@dataclass(frozen=True)
class HoldoutRows:
    """Both ends of the split's line, as far as an adapter and those that it began from were not trained on them.

    Attributes:
        salt: Of the draws.
        gate: Rows that are drawn below this are unseen.
        val: Rows that are drawn among the last so many are too.
    """

    salt: str
    gate: float
    val: float

    def __and__(self, other: "HoldoutRows") -> "HoldoutRows":
        """What neither of two has seen; another salt has mixed all rows."""
        if other.salt != self.salt:
            return HoldoutRows(self.salt, 0.0, 0.0)
        return HoldoutRows(self.salt, min(self.gate, other.gate), min(self.val, other.val))

    def holds(self, instruction: str, context: str, split: str) -> bool:
        """Whether a row of that side of the split is unseen."""
        side = draw(instruction, context, self.salt).side
        return side < self.gate if split == Split.GATE else side >= 1 - self.val
