"""Reads the header of a GGUF file: its metadata and the table of its tensors.

Every count, length and offset is compared with the file's size and with limits far above those of any model before
anything is allocated for it, so a truncated or hostile file is one error. Readers of other libraries trust these
numbers.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from finetune_assets.errors import UserError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_HEADER_BYTES = 64 << 20
"""A vocabulary of 262,144 tokens with its merges takes 12 MB."""
MOST_ELEMENTS = 2_000_000
"""Maximum number of elements of all metadata arrays together."""
MOST_KEYS, MOST_TENSORS, MOST_NAME_BYTES, MOST_DIMENSIONS = 10_000, 100_000, 65_535, 4
MOST_ALIGNMENT = 1 << 20
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Format characters of `struct` by the file's value type."""


class GgufError(UserError):
    """A GGUF file that is damaged, or that cannot be used as a base model."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: Name in llama.cpp.
        shape: Shape in PyTorch's order.
        type: Number of the quantization type.
        start: Offset of the data in the file, in bytes.
        size: Size of the data, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        metadata: Values by key.
        tensors: Tensors by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A metadata value.

        Args:
            key: The key.
            kind: Required type.
            default: Value if the key is absent; without one, the key is required.

        Raises:
            GgufError: if the key is absent or its value has another type.
        """
        if key not in self.metadata:
            if default is not None:
                return default
            raise GgufError(f"{self.path}: no metadata key {key}; convert or download the file again")
        value = self.metadata[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise GgufError(f"{self.path}: {key} is {shortened(value)}, which has the wrong type; convert it again")
        return value


@dataclass
class _Reader:
    """A cursor in the header.

    Attributes:
        path: The file, for messages.
        file: The open file.
        size: Size of the file, in bytes.
        at: Offset of the next value.
        elements: Number of array elements read so far.
    """

    path: Path
    file: BinaryIO
    size: int
    at: int = 0
    elements: int = field(default=0)

    def problem(self, text: str) -> GgufError:
        return GgufError(f"{self.path}: {text}; download or convert the file again")

    def bytes(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.problem(
                f"truncated: {what} of {count:,} bytes at offset {self.at:,}, file of {self.size:,} bytes"
            )
        if self.at + count > MOST_HEADER_BYTES:
            raise self.problem(f"the header exceeds {MOST_HEADER_BYTES:,} bytes at {what}")
        self.at += count
        return self.file.read(count)

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}"), what))[0]

    def text(self, what: str, most: int = MOST_HEADER_BYTES) -> str:
        length = self.number("Q", what)
        if length > most:
            raise self.problem(f"{what} is {length:,} bytes long; at most {most:,} are supported")
        try:
            return self.bytes(length, what).decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.problem(f"{what} is not UTF-8 ({e})") from e

    def count(self, form: str, most: int, what: str) -> int:
        count = int(self.number(form, what))
        if count > most:
            raise self.problem(f"{what} is {count:,}; at most {most:,} is supported")
        return count

    def value(self, key: str) -> Any:
        kind = self.number("I", f"the type of {key}")
        if kind == ARRAY:
            return self.array(key)
        return self.scalar(kind, key)

    def scalar(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.text(key)
        if kind not in NUMBERS:
            raise self.problem(f"{key} has the unknown type {kind}")
        return self.number(NUMBERS[kind], key)

    def array(self, key: str) -> list[Any]:
        kind = self.number("I", f"the type of {key}")
        if kind == ARRAY:
            raise self.problem(f"{key} is an array of arrays, which is not supported")
        count = self.count("Q", MOST_ELEMENTS - self.elements, f"the number of elements of {key}")
        self.elements += count
        if kind in NUMBERS:
            form = f"<{count}{NUMBERS[kind]}"
            return list(struct.unpack(form, self.bytes(struct.calcsize(form), key)))
        return [self.scalar(kind, key) for _ in range(count)]


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        GgufError: naming the file, what is wrong and its value.
    """
    with path.open("rb") as file:
        reader = _Reader(path, file, path.stat().st_size)
        if reader.size < 24 or reader.bytes(4, "the magic bytes") != MAGIC:
            raise GgufError(f"{path}: not a GGUF file (it does not start with 'GGUF'); name another file")
        version = reader.number("I", "the version")
        if version not in VERSIONS:
            raise reader.problem(f"GGUF version {version}; versions 2 and 3, little-endian, are supported")
        tensors = reader.count("Q", MOST_TENSORS, "the number of tensors")
        keys = reader.count("Q", MOST_KEYS, "the number of metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = reader.text("a metadata key", MOST_NAME_BYTES)
            if key in metadata:
                raise reader.problem(f"the metadata key {key} occurs twice")
            metadata[key] = reader.value(key)
        return Header(path, metadata, _tensor_table(reader, tensors, metadata))


def _tensor_table(reader: _Reader, count: int, metadata: dict[str, Any]) -> dict[str, TensorEntry]:
    sizes = block_sizes()
    rows = [_row(reader, sizes) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= MOST_ALIGNMENT:
        raise reader.problem(f"general.alignment is {shortened(alignment)}; expected 1 to {MOST_ALIGNMENT:,}")
    data = -(-reader.at // alignment) * alignment
    end = 0
    for entry in sorted(rows, key=lambda entry: entry.start):
        if entry.start < end:
            raise reader.problem(f"the data of tensor {entry.name} at offset {entry.start:,} overlap another tensor's")
        end = entry.start + entry.size
        if data + end > reader.size:
            raise reader.problem(
                f"truncated: tensor {entry.name} ends at byte {data + end:,}, file of {reader.size:,} bytes"
            )
    tensors = {row.name: TensorEntry(row.name, row.shape, row.type, data + row.start, row.size) for row in rows}
    if len(tensors) < count:
        raise reader.problem("a tensor's name occurs twice")
    return tensors


def _row(reader: _Reader, sizes: Callable[[int], tuple[int, int] | None]) -> TensorEntry:
    """A row of the table of tensors, with the offset of the data relative to the section of data."""
    name = reader.text("a tensor's name", MOST_NAME_BYTES)
    dimensions = reader.count("I", MOST_DIMENSIONS, f"the number of dimensions of tensor {name}")
    shape = tuple(reader.number("Q", f"the shape of tensor {name}") for _ in range(dimensions))[::-1]
    kind = reader.number("I", f"the type of tensor {name}")
    start = reader.number("Q", f"the offset of tensor {name}")
    block = sizes(kind)
    if block is None:
        raise reader.problem(f"tensor {name} has the unknown type {kind}")
    if not shape or 0 in shape or shape[-1] % block[0]:
        raise reader.problem(f"tensor {name} has the shape {[*shape]}, which its type {kind} cannot have")
    return TensorEntry(name, shape, kind, start, prod(shape) // block[0] * block[1])


def block_sizes() -> Callable[[int], tuple[int, int] | None]:
    """Return a function from the number of a type to the elements and bytes of its blocks; None for an unknown type."""
    from gguf import GGML_QUANT_SIZES

    sizes = {int(kind): block for kind, block in GGML_QUANT_SIZES.items()}
    return sizes.get


def shortened(value: object) -> str:
    """The beginning of a value's representation."""
    text = repr(value[:5] if isinstance(value, list) else value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:80] + "..."
