"""The one schema of raw data, the identity of a row, and the side of the split that it falls on."""

import hashlib
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from struct import unpack

import pyarrow as pa

from finetune_assets.config.schema import Data

RAW_SCHEMA = pa.schema(
    [
        pa.field("instruction", pa.string(), nullable=False, metadata={"doc": "what is asked; never blank"}),
        pa.field("context", pa.string(), nullable=False, metadata={"doc": "text to answer from; may be empty"}),
        pa.field("response", pa.string(), nullable=False, metadata={"doc": "the answer to learn; never blank"}),
        pa.field("category", pa.string(), nullable=False, metadata={"doc": "kind of task; may be empty"}),
    ]
)


class Split(StrEnum):
    """A side of the split."""

    TRAIN = "train"
    VAL = "val"
    GATE = "gate"


@dataclass(frozen=True)
class Draw:
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
    answer to the same question can stand on the other side of the split.
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
