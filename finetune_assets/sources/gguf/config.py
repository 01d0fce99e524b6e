"""The configuration of a GGUF file's model, from its metadata and the shapes of its tensors."""

import math
from typing import Any

from finetune_assets.sources.gguf.architectures import OF_FILE, Architecture
from finetune_assets.sources.gguf.header import GgufError, Header, shortened
from finetune_assets.sources.gguf.tokenizer import KEY, TOKENS

ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the rotary embedding's frequencies, as Llama 3.1 and later have."""
REFUSED = "Use the model's original repository or folder as model.base_model"
READ = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
}
"""Hyperparameters that the configuration is built from."""
NEUTRAL: dict[str, Any] = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}
"""Other hyperparameters, with the only value that is supported."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Values of the rotary embeddings of all Llama 3.1, 3.2 and 3.3 models; their `factor` differs."""


def architecture_of(header: Header) -> Architecture:
    """The architecture of a file.

    Raises:
        GgufError: if it is not supported.
    """
    name = header.get("general.architecture", str)
    if name not in OF_FILE:
        raise GgufError(
            f"{header.path}: general.architecture is {shortened(name)}; supported: {', '.join(OF_FILE)}. {REFUSED}"
        )
    return OF_FILE[name]


def config_values(header: Header, architecture: Architecture, factors: list[float] | None = None) -> dict[str, Any]:
    """Values of config.json.

    Args:
        header: Header of the file.
        architecture: The file's architecture.
        factors: Values of the tensor `rope_freqs.weight`, if the file has it.

    Raises:
        GgufError: if a hyperparameter is missing, not supported, or does not fit the tensors.
    """
    prefix = f"{architecture.name}."
    _check_keys(header, prefix)

    def whole(key: str, default: int | None = None) -> int:
        value = int(header.get(prefix + key, int, default))
        if value < 1:
            raise GgufError(f"{header.path}: {prefix}{key} is {value}; expected at least 1; convert the file again")
        return value

    heads, width = whole("attention.head_count"), whole("embedding_length")
    head_dim = whole("attention.key_length", whole("rope.dimension_count", width // heads or 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if whole(key, head_dim) != head_dim:
            raise GgufError(
                f"{header.path}: {prefix}{key} is {whole(key)}, but each head has {head_dim} dimensions. {REFUSED}"
            )
    rope = {"rope_type": "default", "rope_theta": _rounded(header.get(prefix + "rope.freq_base", float, 10_000.0))}
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise GgufError(f"{header.path}: no tensor token_embd.weight of two dimensions; convert the file again")
    tied = "output.weight" not in header.tensors
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": whole("context_length"),
        "rms_norm_eps": _rounded(header.get(prefix + "attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": rope if factors is None else _llama3(header, rope, factors, head_dim),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        **{f"{name}_token_id": _token_id(header, key) for name, key in _IDS.items()},
    }


_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def ends(header: Header) -> list[int]:
    """Ids of the tokens that end an answer: the file's EOS token, end of turn and end of message."""
    ids = (_token_id(header, key) for key in ("eos", "eot", "eom"))
    return sorted({index for index in ids if index is not None})


def check_tensors(header: Header, architecture: Architecture, values: dict[str, Any]) -> dict[str, str]:
    """Check that a file has exactly the tensors of its configuration, with the right shapes.

    Returns:
        Names of the tensors in the file, by their names in transformers.

    Raises:
        GgufError: naming a tensor that is missing, unknown, or of another shape.
    """
    blocks = values["num_hidden_layers"]
    if blocks > len(header.tensors):
        raise GgufError(
            f"{header.path}: {architecture.name}.block_count is {blocks:,}, but there are {len(header.tensors):,} "
            "tensors; download or convert the file again"
        )
    tensors = architecture.tensor_names(blocks, values["tie_word_embeddings"])
    present, expected = {*header.tensors} - {ROPE_FREQS}, {*tensors.values()}
    if missing := sorted(expected - present):
        raise GgufError(
            f"{header.path}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are); download or "
            "convert the file again"
        )
    if unknown := sorted(present - expected):
        raise GgufError(
            f"{header.path}: tensor {shortened(unknown[0])} is not one of the architecture "
            f"{architecture.name}. {REFUSED}"
        )
    for tensor, name in tensors.items():
        shape, actual = _shape(tensor, values), header.tensors[name].shape
        if shape != actual:
            raise GgufError(
                f"{header.path}: tensor {name} has the shape {[*actual]}; the metadata require {[*shape]}; download or "
                "convert the file again"
            )
    tokens = len(header.get(TOKENS, list))
    if tokens > values["vocab_size"]:
        raise GgufError(
            f"{header.path}: {TOKENS} has {tokens:,} tokens for {values['vocab_size']:,} embeddings; convert it again"
        )
    return tensors


def _shape(tensor: str, values: dict[str, Any]) -> tuple[int, ...]:
    width, inner, head = values["hidden_size"], values["intermediate_size"], values["head_dim"]
    queries, keys = values["num_attention_heads"] * head, values["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (values["vocab_size"], width),
        "lm_head": (values["vocab_size"], width),
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
        "q_norm": (head,),
        "k_norm": (head,),
    }
    module, parameter = tensor.split(".")[-2:]
    shape = shapes.get(module, (width,))
    return shape[:1] if parameter == "bias" else shape


def _check_keys(header: Header, prefix: str) -> None:
    for key, value in header.metadata.items():
        name = key.removeprefix(prefix)
        if name == key or name in READ or (name in NEUTRAL and NEUTRAL[name] == value):
            continue
        raise GgufError(f"{header.path}: {key} is {shortened(value)}, which is not supported. {REFUSED}")


def _llama3(header: Header, rope: dict[str, Any], factors: list[float], head_dim: int) -> dict[str, Any]:
    scaled = {**rope, "rope_type": "llama3", "factor": _rounded(max(factors)), **LLAMA3}
    expected = rope_factors(scaled, head_dim)
    if len(factors) != len(expected) or not all(map(_is_close, factors, expected)):
        raise GgufError(
            f"{header.path}: tensor {ROPE_FREQS} is {shortened(factors)}, which is not the scaling of Llama "
            f"3.1. {REFUSED}"
        )
    return scaled


def rope_factors(rope: dict[str, Any], head_dim: int) -> list[float]:
    """Divisors of the frequencies of a rotary embedding of the type `llama3`."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    factors = []
    for index in range(0, head_dim, 2):
        waves = length / (2 * math.pi * rope["rope_theta"] ** (index / head_dim))
        smooth = min(max((waves - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _is_close(actual: float, expected: float) -> bool:
    return math.isclose(actual, expected, rel_tol=1e-4)


def _token_id(header: Header, name: str) -> int | None:
    index = int(header.get(f"{KEY}{name}_token_id", int, -1))
    return index if index >= 0 else None


def _rounded(value: float) -> float:
    """The shortest number with the same float32 value: a file stores 1e-05 as 9.999999747378752e-06."""
    return float(f"{value:.7g}")
