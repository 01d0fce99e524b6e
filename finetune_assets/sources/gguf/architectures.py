"""Architectures that are converted from and to GGUF files: names of tensors, hyperparameters, order of weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BLOCK = "model.layers.{}."


@dataclass(frozen=True)
class Architecture:
    """An architecture of the Llama family.

    Attributes:
        name: Value of `general.architecture`.
        model_type: Model type in transformers.
        class_name: Class in transformers.
        permutes: Whether llama.cpp stores the rows of query and key with the two halves of each head interleaved.
        attention_bias: Whether query, key and value have a bias.
        attention_norm: Whether query and key are normalized.
    """

    name: str
    model_type: str
    class_name: str
    permutes: bool = False
    attention_bias: bool = False
    attention_norm: bool = False

    def tensor_names(self, blocks: int, tied: bool) -> dict[str, str]:
        """Names of all tensors in a GGUF file, by their names in transformers.

        Args:
            blocks: Number of blocks.
            tied: Whether the output layer is the input embedding.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == self.name)
        names = get_tensor_name_map(kind, blocks)
        of = {}
        for tensor in ("model.embed_tokens.weight", "model.norm.weight", *([] if tied else ["lm_head.weight"])):
            of[tensor] = names.get_name(tensor, (".weight",))
        for block in range(blocks):
            for tensor in (BLOCK.format(block) + part for part in self._parts()):
                of[tensor] = names.get_name(tensor, (".weight", ".bias"))
        assert all(of.values()), of
        return {tensor: str(name) for tensor, name in of.items()}

    def _parts(self) -> list[str]:
        parts = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        parts += [f"self_attn.{each}_proj.weight" for each in "qkvo"]
        parts += [f"mlp.{each}_proj.weight" for each in ("gate", "up", "down")]
        if self.attention_bias:
            parts += [f"self_attn.{each}_proj.bias" for each in "qkv"]
        if self.attention_norm:
            parts += [f"self_attn.{each}_norm.weight" for each in "qk"]
        return parts

    def heads_to_permute(self, tensor: str, config: Mapping[str, Any]) -> int | None:
        """Number of heads whose rows llama.cpp stores in another order; None if it stores the tensor as it is."""
        if not self.permutes:
            return None
        if ".q_proj." in tensor:
            return int(config["num_attention_heads"])
        return int(config["num_key_value_heads"]) if ".k_proj." in tensor else None


LLAMA = Architecture("llama", "llama", "LlamaForCausalLM", permutes=True)
QWEN2 = Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", attention_bias=True)
QWEN3 = Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", attention_norm=True)
OF_FILE = {each.name: each for each in (LLAMA, QWEN2, QWEN3)}
"""By `general.architecture`."""
OF_MODEL = {**{each.model_type: each for each in (LLAMA, QWEN2, QWEN3)}, "mistral": LLAMA}
"""By the model type in config.json; llama.cpp has no architecture of its own for Mistral."""


def interleaved(rows: Any, heads: int) -> Any:
    """Rows of query or key in llama.cpp's order: each head's two halves interleaved. An array of numpy or PyTorch."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def deinterleaved(rows: Any, heads: int) -> Any:
    """Rows of query or key in transformers' order; the inverse of `interleaved`."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)
