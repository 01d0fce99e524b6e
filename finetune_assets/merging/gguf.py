"""Exports a merged model as a GGUF file, for llama.cpp and Ollama.

Supported: the architectures of `sources/gguf/architectures.py`, and byte-level BPE tokenizers that llama.cpp reproduces
exactly. Everything else is refused: llama.cpp would load it without an error, and answer with something else.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetune_assets.merging.gguf_tokenizer import ExportError, TokenizerValues, tokenizer_values
from finetune_assets.sources.gguf.architectures import OF_MODEL, Architecture, interleaved
from finetune_assets.sources.gguf.config import ROPE_FREQS, rope_factors
from finetune_assets.sources.gguf.convert import shape_of
from finetune_assets.sources.gguf.header import read_header

FOLDER = "gguf"
"""Folder of the exports in a merged model's folder."""
TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
ADVICE = "remove merge.gguf, or use another base model"


def file_name(kind: str) -> str:
    """Name of the file of a format."""
    return f"model-{kind}.gguf"


def check_exportable(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check a base model before anything is computed.

    Args:
        folder: Folder of the base model.
        tokenizer: The experiment's tokenizer.

    Raises:
        ExportError: naming what llama.cpp does not compute as transformers does.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _check_config(config, folder)
    tokenizer_values(tokenizer, max(tokenizer.get_vocab().values()) + 1, [], False)


def export(folder: Path, kind: str, tokenizer: PreTrainedTokenizerBase, ends: list[int], begins: bool) -> Path:
    """Write a merged model as a GGUF file in the folder `gguf` beside it.

    Args:
        folder: Folder of the merged model.
        kind: Format: f16, bf16 or q8_0.
        tokenizer: Tokenizer of the merged model, with its chat template.
        ends: Ids of the tokens that end an answer.
        begins: Whether every prompt of the training begins with the BOS token.

    Returns:
        The file.

    Raises:
        ExportError: if the model cannot be exported exactly.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = _check_config(config, folder)
    weights = _Weights(folder)
    tied = "lm_head.weight" not in weights.files
    tensors = architecture.tensor_names(config.num_hidden_layers, tied)
    if different := sorted(tensors.keys() ^ weights.files.keys()):
        raise ExportError(
            f"{folder}: tensor {different[0]} is not one of the architecture {architecture.name} in llama.cpp; {ADVICE}"
        )
    rows = weights.shape("model.embed_tokens.weight")[0]
    path = folder / FOLDER / file_name(kind)
    path.parent.mkdir(exist_ok=True)
    writer = GGUFWriter(path, architecture.name)
    try:
        writer.add_name(folder.name if kind == "" else "model")
        writer.add_file_type(TYPES[kind][1])
        _add_shape(writer, config, rows)
        _add_tokenizer(writer, tokenizer_values(tokenizer, rows, ends, begins), tokenizer)
        _write_tensors(writer, weights, tensors, architecture, config, TYPES[kind][0])
    finally:
        writer.close()
    return path


def load_exported(path: Path, device: torch.device) -> PreTrainedModel:
    """Load a GGUF file with transformers' reader of weights, in float32.

    The configuration is read here: transformers 5.23 ignores a file's scaling of rotary embeddings, and the size of
    Qwen3's heads.
    """
    values = shape_of(read_header(path))[1]
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, local_files_only=True
    )
    return model.to(device).eval()


def _check_config(config: PretrainedConfig, folder: Path) -> Architecture:
    """The model's architecture, if llama.cpp computes all of its settings."""
    architecture = OF_MODEL.get(config.model_type)
    if architecture is None:
        raise ExportError(
            f"{folder}: the architecture {config.model_type} cannot be exported as GGUF; supported: "
            f"{', '.join(sorted(OF_MODEL))}; {ADVICE}"
        )
    rope = _rope(config)
    expected = {
        "hidden_act": (getattr(config, "hidden_act", "silu"), ("silu",)),
        "attention_bias": (bool(getattr(config, "attention_bias", False)), (False,)),
        "mlp_bias": (bool(getattr(config, "mlp_bias", False)), (False,)),
        "rope_parameters.rope_type": (
            rope["rope_type"],
            ("default", "llama3") if architecture.permutes else ("default",),
        ),
        "rope_parameters.partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
    }
    for key, (value, supported) in expected.items():
        if value not in supported:
            raise ExportError(
                f"{folder}/config.json: {key} is {value!r}, which a GGUF file of {architecture.name} cannot "
                f"express; {ADVICE}"
            )
    return architecture


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    return {"rope_theta": 10_000.0, "rope_type": "default", **rope}


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_shape(writer: GGUFWriter, config: PretrainedConfig, rows: int) -> None:
    head_dim = _head_dim(config)
    # Within a sliding window, attention is full; llama.cpp has no windows in these architectures
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_vocab_size(rows)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: GGUFWriter, values: TokenizerValues, tokenizer: PreTrainedTokenizerBase) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(values.pre_tokenizer)
    writer.add_token_list(values.tokens)
    writer.add_token_types(values.types)
    writer.add_token_merges(values.merges)
    for name, index in values.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(values.begins)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())  # of several named ones, that of training


class _Weights:
    """The tensors of a folder's safetensors, read one at a time.

    Attributes:
        files: Names of the files, by tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {name: path for path in folder.glob("*.safetensors") for name in self._names(path)}

    def _names(self, path: Path) -> list[str]:
        with safe_open(path, "pt") as file:
            return list(file.keys())

    def shape(self, name: str) -> list[int]:
        with safe_open(self.files[name], "pt") as file:
            return list(file.get_slice(name).get_shape())

    def values(self, name: str) -> "np.ndarray[Any, Any]":
        with safe_open(self.files[name], "pt") as file:
            values: np.ndarray[Any, Any] = file.get_tensor(name).float().numpy()
            return values


def _write_tensors(
    writer: GGUFWriter,
    weights: _Weights,
    tensors: dict[str, str],
    architecture: Architecture,
    config: PretrainedConfig,
    quantization: GGMLQuantizationType,
) -> None:
    """Write the table of tensors, then the tensors one after the other."""
    kinds = {tensor: _kind(weights.shape(tensor), quantization) for tensor in tensors}
    rope = _rope(config)
    factors = np.array(rope_factors(rope, _head_dim(config)), np.float32) if rope["rope_type"] == "llama3" else None
    if factors is not None:
        writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
    for tensor, name in tensors.items():
        shape, kind = weights.shape(tensor), kinds[tensor]
        elements, size = GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), prod(shape) // elements * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data in _data(weights, tensors, kinds, architecture, config, factors):
        writer.write_tensor_data(data)


def _data(
    weights: _Weights,
    tensors: dict[str, str],
    kinds: dict[str, GGMLQuantizationType],
    architecture: Architecture,
    config: PretrainedConfig,
    factors: "np.ndarray[Any, Any] | None",
) -> Iterator["np.ndarray[Any, Any]"]:
    if factors is not None:
        yield factors
    for tensor in tensors:
        values = weights.values(tensor)
        heads = architecture.heads_to_permute(tensor, config.to_dict())
        values = np.ascontiguousarray(values if heads is None else interleaved(values, heads))
        with np.errstate(over="ignore"):
            data = quantize(values, kinds[tensor])
        if kinds[tensor] == GGMLQuantizationType.F16 and not np.isfinite(data).all():
            raise ExportError(
                f"merge.gguf: tensor {tensor} has the value {np.abs(values).max():.3g}, which float16 cannot "
                "represent; use bf16 in place of f16"
            )
        yield data


def _kind(shape: list[int], quantization: GGMLQuantizationType) -> GGMLQuantizationType:
    """Type of a tensor: vectors remain in float32; rows that cannot be divided into blocks take 16 bits."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return quantization if shape[-1] % GGML_QUANT_SIZES[quantization][0] == 0 else GGMLQuantizationType.F16
