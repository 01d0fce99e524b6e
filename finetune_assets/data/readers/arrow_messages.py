"""Bounds the memory of reading an Arrow file by the sizes before its compressed buffers.

Messages are tables of FlatBuffers (https://flatbuffers.dev/internals); their fields are those of `Message.fbs` in
Arrow's format specification.
"""

from collections.abc import Iterator
from pathlib import Path
from struct import error as StructError
from struct import unpack_from
from typing import TYPE_CHECKING

from finetune_assets.data.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_BATCH_BYTES = 512 << 20
"""Size of a decompressed batch."""
MAGIC_BYTES = 8
"""Length of what precedes the messages in the file format; the stream format has nothing."""
DICTIONARY_BATCH, RECORD_BATCH = 2, 3
HEADER_TYPE, HEADER = 1, 2
DICTIONARY_DATA = 1
BUFFERS, COMPRESSION = 2, 3
"""Numbers of fields of `Message`, `DictionaryBatch` and `RecordBatch`."""
BUFFER_BYTES = 16


def check_batches(path: Path, is_file: bool) -> int:
    """Check the decompressed size of each batch and dictionary of an Arrow file; the number of its record batches.

    Args:
        path: The file.
        is_file: Whether it has the file format; otherwise it has the stream format.

    Raises:
        DataError: if reading a batch would require too much memory.
        pyarrow.ArrowException: if the file is truncated, or none of Arrow's.
    """
    import pyarrow as pa

    batches = 0
    with pa.memory_map(str(path)) as source:
        source.seek(MAGIC_BYTES if is_file else 0)
        for number, message in enumerate(pa.ipc.MessageReader.open_stream(source), 1):
            try:
                size = sum(_decompressed_sizes(message))
            except StructError as e:
                raise pa.ArrowInvalid(f"message {number} points outside of itself") from e
            if size > MAX_BATCH_BYTES:
                raise DataError(
                    f"{path}: a batch has {size:,} bytes once it is decompressed, above {MAX_BATCH_BYTES:,}; write "
                    "the file in smaller batches"
                )
            batches += message.type == "record batch"
    return batches


def _decompressed_sizes(message: "pa.Message") -> Iterator[int]:
    """Decompressed size of each compressed buffer of a message. A size below 0 means that the buffer is as it was."""
    table = message.metadata.to_pybytes()
    (root,) = unpack_from("<I", table)
    kind, header = _field(table, root, HEADER_TYPE), _field(table, root, HEADER)
    if not kind or not header or table[kind] not in (DICTIONARY_BATCH, RECORD_BATCH):
        return
    batch = _target(table, header)
    if table[kind] == DICTIONARY_BATCH:
        if not (data := _field(table, batch, DICTIONARY_DATA)):
            return
        batch = _target(table, data)
    buffers = _field(table, batch, BUFFERS)
    if not buffers or not _field(table, batch, COMPRESSION):
        return
    vector = _target(table, buffers)
    (count,) = unpack_from("<I", table, vector)
    for number in range(count):
        offset, length = unpack_from("<qq", table, vector + 4 + number * BUFFER_BYTES)
        if length >= 8:
            (size,) = unpack_from("<q", message.body, offset)
            yield max(0, size)


def _field(table: bytes, position: int, number: int) -> int:
    """Position of a field of the table at `position`; 0 if the table does not have it."""
    (back,) = unpack_from("<i", table, position)
    vtable = position - back
    (size,) = unpack_from("<H", table, vtable)
    entry = 4 + 2 * number
    if entry >= size:
        return 0
    (offset,) = unpack_from("<H", table, vtable + entry)
    return position + int(offset) if offset else 0


def _target(table: bytes, position: int) -> int:
    """Position that the offset at `position` points to."""
    (offset,) = unpack_from("<I", table, position)
    return position + int(offset)
