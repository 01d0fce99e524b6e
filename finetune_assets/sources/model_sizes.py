"""Refuses a model whose config.json names sizes that its weights cannot have, before anything is allocated."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune_assets.errors import UserError
from finetune_assets.sources.json_files import read_json_object

CONFIG, MOST_BYTES = "config.json", 16 << 20
AGAIN = "download or save the model again"
LIMITS: dict[tuple[str, ...], int] = {
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"): 10_000,
    ("hidden_size", "n_embd", "d_model", "dim"): 1_000_000,
    ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size", "d_ff"): 10_000_000,
    ("vocab_size",): 100_000_000,
    ("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"): 100_000,
    ("num_experts", "num_local_experts", "n_routed_experts"): 100_000,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "sliding_window"): 1 << 31,
}
"""Maximum of each size, by its names in the configurations of architectures; far above those of any model."""
IN_WEIGHTS = ("vocab_size", "num_hidden_layers", "n_layer", "hidden_size", "n_embd", "intermediate_size", "n_inner")
"""Sizes of which each unit has at least one weight."""
NUMBERS_PER_BYTE = 2
"""Quantized weights have four bits."""
LEARNED_POSITIONS = ("gpt2", "gpt_bigcode", "gpt_neo", "opt", "biogpt", "xglm")
"""Model types with a weight for each position."""


class ModelSizeError(UserError):
    """A configuration names a size that is not supported, or that the weights do not have."""


def check_sizes(folder: Path, weight_bytes: int | None = None) -> None:
    """Check the sizes in a model's config.json.

    Args:
        folder: Folder with config.json.
        weight_bytes: Size of its weights; None where they are not at hand.

    Raises:
        ModelSizeError: naming the file, the key and its value.
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    tree = read_json_object(path, f"{path}:", ModelSizeError, AGAIN, MOST_BYTES)
    for config in (tree, *(value for value in tree.values() if isinstance(value, dict))):
        for problem in _problems(config, None if weight_bytes is None else weight_bytes * NUMBERS_PER_BYTE):
            raise ModelSizeError(f"{path}: {problem}; {AGAIN}")


def weights_in(folder: Path) -> int | None:
    """Size of the weights in a folder, in bytes; None if there are none, or a file of them is damaged."""
    files = [*folder.glob("*.safetensors")]
    try:
        for path in files:
            with safe_open(path, "pt"):
                pass
    except (OSError, SafetensorError):
        return None
    return sum(path.stat().st_size for path in files) or None


def _problems(config: dict[str, Any], numbers: int | None) -> Iterator[str]:
    sizes = {name: config[name] for names in LIMITS for name in names if _is_number(config.get(name))}
    for names, limit in LIMITS.items():
        for name in names:
            if sizes.get(name, 0) > limit:
                yield f"{name} is {sizes[name]:,}; at most {limit:,} is supported"
    if numbers is None:
        return
    for name in IN_WEIGHTS:
        if sizes.get(name, 0) > numbers:
            yield f"{name} is {sizes[name]:,}, more than its weights have room for"
    width = sizes.get("hidden_size", sizes.get("n_embd", 0))
    factor = sizes.get("vocab_size", 0) if not {"embedding_size", "word_embed_proj_dim"} & config.keys() else 0
    if factor * width > numbers:
        yield f"vocab_size {factor:,} and hidden size {width:,} are more than its weights have room for"
    positions = sizes.get("n_positions", sizes.get("max_position_embeddings", 0))
    if config.get("model_type") in LEARNED_POSITIONS and positions > numbers:
        yield f"{positions:,} positions are more than its weights have room for"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
