"""Converts a GGUF file to a folder that transformers loads: safetensors in bfloat16, configuration, tokenizer."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.sources.gguf.architectures import Architecture, deinterleaved
from finetune_assets.sources.gguf.config import ROPE_FREQS, architecture_of, check_tensors, config_values, ends
from finetune_assets.sources.gguf.header import GgufError, Header, TensorEntry, read_header
from finetune_assets.sources.gguf.tokenizer import build_tokenizer

if TYPE_CHECKING:
    import numpy as np

VERSION = "1"
"""Part of the revision of a converted model; increment it when the converter writes other bytes."""
SHARD_BYTES = 2 << 30
BYTES = 2
"""Bytes of a bfloat16 number."""


def convert(path: Path, output: Path) -> None:
    """Convert a GGUF file.

    Args:
        path: The file.
        output: Empty folder to write to.

    Raises:
        GgufError: if the file is damaged, or of an architecture or a tokenizer that is not supported.
    """
    header = read_header(path)
    architecture, values, tensors = shape_of(header)
    tokenizer = build_tokenizer(header)
    _write_weights(header, architecture, values, tensors, output)
    tokenizer.save_pretrained(output)
    generation = {**{f"{name}_token_id": values[f"{name}_token_id"] for name in ("bos", "pad")}}
    generation["eos_token_id"] = ends(header) or None
    _write_json(output / "config.json", values)
    _write_json(output / "generation_config.json", generation)


def write_config(path: Path, output: Path) -> None:
    """Write only config.json of a GGUF file's model.

    Raises:
        GgufError: if the file is damaged, or of an architecture that is not supported.
    """
    _write_json(output / "config.json", shape_of(read_header(path))[1])


def shape_of(header: Header) -> tuple[Architecture, dict[str, Any], dict[str, str]]:
    """Architecture, values of config.json, and the names of the tensors by their names in transformers.

    Raises:
        GgufError: if metadata and tensors do not fit together, or are not supported.
    """
    architecture = architecture_of(header)
    factors = header.tensors.get(ROPE_FREQS)
    values = config_values(header, architecture, None if factors is None else _values(header, factors).tolist())
    return architecture, values, check_tensors(header, architecture, values)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")


def _write_weights(
    header: Header, architecture: Architecture, values: dict[str, Any], tensors: dict[str, str], output: Path
) -> None:
    """Write the weights in shards, so that one shard at a time is in memory."""
    import torch
    from safetensors.torch import save_file

    from finetune_assets.sources.base_models import INDEX, WEIGHTS

    shards = [*_shards(header, tensors)]
    of: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {}
        for tensor in names:
            rows = _values(header, header.tensors[tensors[tensor]])
            heads = architecture.heads_to_permute(tensor, values)
            rows = rows if heads is None else deinterleaved(rows, heads)
            weights[tensor] = torch.from_numpy(rows).to(torch.bfloat16).contiguous()
            if not weights[tensor].isfinite().all():
                raise GgufError(
                    f"{header.path}: tensor {tensors[tensor]} has values that are not finite; download or convert the "
                    "file again"
                )
            of[tensor] = file
        save_file(weights, output / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(prod(header.tensors[name].shape) for name in tensors.values()) * BYTES
        index = {"metadata": {"total_size": total}, "weight_map": of}
        _write_json(output / INDEX, index)


def _shards(header: Header, tensors: dict[str, str]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for tensor, name in tensors.items():
        bytes_of = prod(header.tensors[name].shape) * BYTES
        if names and size + bytes_of > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(tensor)
        size += bytes_of
    yield names


def _values(header: Header, entry: TensorEntry) -> "np.ndarray[Any, Any]":
    """The values of a tensor in float32."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(entry.type)
    raw = np.memmap(header.path, np.uint8, "r", entry.start, (entry.size,)).reshape(*entry.shape[:-1], -1)
    try:
        values = dequantize(raw, kind)
    except NotImplementedError as e:
        raise GgufError(
            f"{header.path}: tensor {entry.name} has the type {kind.name}, which cannot be dequantized; use a file "
            "with another quantization, such as Q8_0 or Q4_K"
        ) from e
    return np.array(values, np.float32).reshape(entry.shape)
