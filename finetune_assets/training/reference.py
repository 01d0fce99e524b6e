"""Log-probabilities of judged answers under the reference model, computed once before the first step.

The reference is the base model, by switching the adapter off, or the champion, whose adapter is loaded beside the
trained one for as long as it computes. No second base model is ever in memory. Afterwards only two numbers of each
answer are left, in `reference.arrow`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch
from peft import PeftModel
from torch import Tensor

from finetune_assets.training.adapter_config import check_adapter
from finetune_assets.training.judged import JudgedExamples

ADAPTER, TYPES = "reference", b"types"
SCHEMA = pa.schema(
    [
        pa.field("split", pa.string(), metadata={"doc": "train or val"}),
        pa.field(
            "log_prob", pa.float32(), metadata={"doc": "of the answer, in nats; 0 of examples that are not judged"}
        ),
        pa.field("mismatched", pa.float32(), metadata={"doc": "the same of the prompt with another answer (kto)"}),
    ]
)


@contextmanager
def reference_model(model: PeftModel, adapter: Path | None, is_initial: bool) -> Iterator[None]:
    """Have a model compute as the reference.

    Args:
        model: The model, before its first step.
        adapter: Folder of the champion's adapter; None for the base model.
        is_initial: Whether the initial adapter is the reference, which then computes as it is.
    """
    if is_initial:
        yield
    elif adapter is None:
        with model.disable_adapter():
            yield
    else:
        check_adapter(adapter)
        own = model.active_adapter
        model.load_adapter(str(adapter), ADAPTER, is_trainable=False)
        model.set_adapter(ADAPTER)
        try:
            yield
        finally:
            model.set_adapter(own)
            model.delete_adapter(ADAPTER)


def serialized(splits: dict[str, JudgedExamples], types: str) -> bytes:
    """Content of `reference.arrow`.

    Args:
        splits: The splits, by name.
        types: Data types of the computation, on which the values depend.
    """
    sink = pa.BufferOutputStream()
    schema = SCHEMA.with_metadata({TYPES: types})
    with pa.ipc.new_stream(sink, schema) as writer:
        for name, judged in splits.items():
            columns = [
                pa.array([name] * len(judged.examples)),
                *map(_column, (judged.reference, judged.reference_mismatched)),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return bytes(sink.getvalue())


def restore(content: bytes, splits: dict[str, JudgedExamples], types: str) -> bool:
    """Set the log-probabilities of `reference.arrow`, if it has those of exactly these examples and types."""
    table = pa.ipc.open_stream(content).read_all()
    if (table.schema.metadata or {}).get(TYPES) != types.encode():
        return False
    if table["split"].to_pylist() != [name for name, judged in splits.items() for _ in range(len(judged.examples))]:
        return False
    start = 0
    for judged in splits.values():
        part = table.slice(start, len(judged.examples))
        judged.reference = torch.from_numpy(part["log_prob"].to_numpy().copy())
        judged.reference_mismatched = torch.from_numpy(part["mismatched"].to_numpy().copy())
        start += len(part)
    return True


def _column(values: Tensor) -> pa.Array:
    return pa.array(values.numpy(), pa.float32())
