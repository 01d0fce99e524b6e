"""Settings whose adapter a vLLM server cannot serve, known before training; checked with vLLM 0.32.0.

`rank_pattern`, `alpha_pattern`, rsLoRA, and ranks that the server does not allow are no problem: the servable copy has
none of them (see `copy.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_assets.config.schema import ExperimentConfig, Serving
from finetune_assets.config.serving_validation import RANKS
from finetune_assets.config.validation import REWRITES_BASE

MERGE = "add `merge: {}` and serve merged_model"
WITHOUT_LORA = (
    "BailingMoeV2_5ForCausalLM",
    "BailingMoeV3ForCausalLM",
    "BloomForCausalLM",
    "Cohere2MoeForCausalLM",
    "DbrxForCausalLM",
    "FalconForCausalLM",
    "FalconMambaForCausalLM",
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "Gemma3nForCausalLM",
    "HrmTextForCausalLM",
    "IQuestLoopCoderForCausalLM",
    "KimiLinearForCausalLM",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "MiMoV2FlashForCausalLM",
    "MiMoV2ForCausalLM",
    "MiniMaxM3SparseForCausalLM",
    "OrionForCausalLM",
    "StableLmForCausalLM",
    "Step1ForCausalLM",
    "Step3TextForCausalLM",
    "Step3p5ForCausalLM",
    "Zamba2ForCausalLM",
)
"""Architectures of text models that vLLM 0.32.0 loads without adapters: their classes do not implement `SupportsLoRA`,
and `--enable-lora` fails."""
BITSANDBYTES = "bitsandbytes"
"""Quantization method of weights that are stored as int8 or nf4. vLLM 0.32.0 does not have it any more."""


@dataclass(frozen=True)
class Problem:
    """A reason why a server cannot serve the adapter of an experiment.

    Attributes:
        what: The setting and its value.
        why: What the server does.
        remedy: Settings that are servable.
        refused: True if vLLM refuses the adapter or its base model; False if it serves the adapter with other answers
            than those of the evaluation.
    """

    what: str
    why: str
    remedy: str
    refused: bool = True

    def __str__(self) -> str:
        return f"{self.what}: {self.why}; {self.remedy}"

    @property
    def heading(self) -> str:
        """Whether it cannot be served, or not as it was evaluated."""
        return "Not servable with vLLM" if self.refused else "Served with other answers by vLLM"


def server_base_name(config: ExperimentConfig) -> str:
    """Name of the experiment's base model on the servers."""
    named = config.serving.base_name if config.serving else None
    return named or config.model.base_model


def saved_ranks(config: ExperimentConfig) -> dict[str, int]:
    """Ranks of the saved adapter by setting; PEFT doubles those of an initialization that modifies the base weights."""
    ranks = {"lora.rank": config.lora.rank}
    ranks |= {f"lora.rank_pattern.{name}": rank for name, rank in config.lora.rank_pattern.items()}
    return {setting: rank * _growth(config) for setting, rank in ranks.items()}


def _growth(config: ExperimentConfig) -> int:
    scheme = config.lora.init_lora_weights
    return 2 if isinstance(scheme, str) and scheme.startswith(REWRITES_BASE) else 1


def problems(config: ExperimentConfig, base: Mapping[str, Any] | None = None) -> list[Problem]:
    """Problems that prevent vLLM from serving an experiment's adapter; empty if it is servable.

    Args:
        config: The experiment's settings. Without a group `serving`, its defaults apply.
        base: Content of the base model's `config.json`, if it is known.
    """
    return [*_features(config), *_ranks(config), *_base(config, base or {})]


def _features(config: ExperimentConfig) -> Iterator[Problem]:
    lora, tokens = config.lora, config.data.tokenization.added_tokens
    if lora.use_dora:
        yield Problem("lora.use_dora is true", "vLLM does not load DoRA adapters", f"set it to false, or {MERGE}")
    if lora.bias != "none":
        yield Problem(f"lora.bias is {lora.bias}", "vLLM does not load trained biases", f"set it to none, or {MERGE}")
    if lora.modules_to_save:
        names = ", ".join(lora.modules_to_save)
        yield Problem(
            f"lora.modules_to_save is [{names}]",
            "vLLM does not load fully trained modules",
            f"set it to null, or {MERGE}",
        )
    if tokens:
        yield Problem(
            f"data.tokenization.added_tokens has {len(tokens):,} tokens, {tokens[0]!r} first",
            "vLLM does not load trained embedding rows",
            f"remove them, or {MERGE}",
        )


def _ranks(config: ExperimentConfig) -> Iterator[Problem]:
    most, growth = (config.serving or Serving()).max_rank, _growth(config)
    for setting, rank in saved_ranks(config).items():
        if rank <= most:
            continue
        saved = f", which is saved as {rank} after {config.lora.init_lora_weights}" if growth > 1 else ""
        larger = next((allowed for allowed in RANKS if allowed >= rank), None)
        raised = f", or serving.max_rank to {larger} (vllm serve --max-lora-rank {larger})" if larger else ""
        lowered = f"set it to {most // growth}" if most >= growth else "set lora.init_lora_weights to true"
        yield Problem(
            f"{setting} is {rank // growth}{saved}", f"the server's limit is serving.max_rank {most}", lowered + raised
        )


def _base(config: ExperimentConfig, base: Mapping[str, Any]) -> Iterator[Problem]:
    name, quantization = config.model.base_model, config.model.quantization
    named = base.get("architectures")
    for architecture in named if isinstance(named, list) else []:
        if architecture in WITHOUT_LORA:
            yield Problem(
                f"model.base_model {name} is a {architecture}",
                "vLLM does not load adapters for this architecture",
                f"use a base model of another architecture, or {MERGE}",
            )
    stored = base.get("quantization_config")
    if isinstance(stored, dict) and stored.get("quant_method") == BITSANDBYTES:
        yield Problem(
            f"the weights of model.base_model {name} are quantized with {BITSANDBYTES}",
            "vLLM does not load them",
            f"use the model's unquantized weights, or {MERGE}",
        )
    elif quantization != "none":
        yield Problem(
            f"model.quantization is {quantization}",
            "the adapter is trained on rounded weights, and vLLM computes with the published ones, so answers differ",
            f"set it to none, or {MERGE}",
            refused=False,
        )
