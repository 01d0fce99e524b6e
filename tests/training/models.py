"""Tiny random models of many architectures, with the packaged tokenizer."""

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from finetune_assets.sources.base_models import PACKAGED

VOCABULARY = 1_024
"""Tokens of the packaged tokenizer."""
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # at the usual 0.02 so narrow a model hardly attends, and no leak would show
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
QWEN = {
    "vocab_size": VOCABULARY + 8,
    "num_key_value_heads": 2,
}  # its tokenizer class adds a token; it has rows to spare
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "llama-tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**{**SHAPE, **QWEN}),
    "qwen3": Qwen3Config(**{**GROUPED, **QWEN}),
    "mistral": MistralConfig(**GROUPED),
    "gemma": GemmaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED),
    "gemma3": Gemma3TextConfig(**GROUPED),
    "phi": PhiConfig(**SHAPE),
    "phi3": Phi3Config(**SHAPE, num_key_value_heads=2),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, eos_token_id=2
    ),
}

VOCABULARIES: dict[str, PreTrainedConfig] = {
    "one row too few": LlamaConfig(**{**SHAPE, "vocab_size": VOCABULARY - 1}),
    "one spare row": LlamaConfig(**{**SHAPE, "vocab_size": VOCABULARY + 1}, tie_word_embeddings=True),
    "spare rows": LlamaConfig(**{**SHAPE, "vocab_size": VOCABULARY + 5}),
}
"""Models whose embeddings have other numbers of rows than the tokenizer has tokens."""


def save_model(config: PreTrainedConfig, folder: Path, max_shard_size: str = "5GB") -> Path:
    """Write a random model of this configuration and the packaged tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PACKAGED["demo-base"] / name, folder)
    return folder
