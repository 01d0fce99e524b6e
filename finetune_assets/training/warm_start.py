"""Compares an adapter for a warm start with the settings, so that what is stated with the new adapter was used.

A warm start continues with the modules and ranks of the adapter. Settings that state others are refused; dropout is
not part of the weights, so the experiment's value is used.
"""

from collections.abc import Iterator
from dataclasses import fields

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel

from finetune_assets.config.fields import default_of
from finetune_assets.config.schema import Lora
from finetune_assets.training.lora_names import adapted_modules, pattern_of, saved_modules

SAME = {"rank": "r", "alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora", "bias": "bias"}
"""Settings that must be equal, with PEFT's names."""
REWROTE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the base weights, unless the adapter was converted when it was saved."""
COMPARED = {
    *SAME.values(),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "init_lora_weights", "task_type", "lora_dropout", "trainable_token_indices"),
}
"""Fields of PEFT's config that are compared individually, or set to the experiment's value."""
NO_EFFECT = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""Fields that PEFT sets automatically, or that only an initialization reads."""


def warm_start_problem(theirs: PeftConfig, lora: Lora, ours: LoraConfig, base: PreTrainedModel) -> str | None:
    """The first difference of an adapter from the settings; None if training can continue it.

    Args:
        theirs: Config of the adapter.
        lora: The experiment's settings.
        ours: Config that a new adapter would have.
        base: The base model.
    """
    if not isinstance(theirs, LoraConfig):
        return f"the adapter is of type {theirs.peft_type}, not LORA"
    return next(_differences(theirs, lora, ours, base), None)


def _differences(theirs: LoraConfig, lora: Lora, ours: LoraConfig, base: PreTrainedModel) -> Iterator[str]:
    for name, peft_name in SAME.items():
        actual, expected = getattr(theirs, peft_name), getattr(lora, name)
        if actual != expected:
            yield _other(name, actual, expected)
    yield from _modules(theirs, ours, base)
    saved = saved_modules(theirs.modules_to_save, base)
    if saved != saved_modules(ours.modules_to_save, base):
        yield _other("modules_to_save", theirs.modules_to_save, ours.modules_to_save)
    if str(theirs.init_lora_weights).startswith(REWROTE_BASE):
        yield (
            f"the adapter was initialized with {theirs.init_lora_weights} and belongs to changed base weights; convert "
            "it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if theirs.task_type not in (None, "CAUSAL_LM"):
        yield _other("task_type", theirs.task_type, lora.task_type)
    for field in fields(LoraConfig):
        value = getattr(theirs, field.name)
        if field.name not in COMPARED | NO_EFFECT and value != default_of(field):
            yield f"the adapter has {field.name} {value}, which no setting of lora provides; use another adapter"


def _modules(theirs: LoraConfig, ours: LoraConfig, base: PreTrainedModel) -> Iterator[str]:
    """Differences in the adapted modules and in their ranks and scales."""
    modules, expected = adapted_modules(theirs, base), adapted_modules(ours, base)
    names, expected_names = _last_names(modules), _last_names(expected)
    if names != expected_names:
        yield _other("target_modules", names, expected_names)
    if modules != expected:
        yield _other("layers_to_transform", theirs.layers_to_transform, ours.layers_to_transform)
    for module in modules:
        if _value(theirs.rank_pattern, module, theirs.r) != _value(ours.rank_pattern, module, ours.r):
            yield _other("rank_pattern", theirs.rank_pattern or {}, ours.rank_pattern or {})
        if _value(theirs.alpha_pattern, module, theirs.lora_alpha) != ours.lora_alpha:
            yield f"the adapter has alpha_pattern {theirs.alpha_pattern}, which no setting of lora provides"


def _value(patterns: dict[str, int] | None, module: str, default: float) -> float:
    matching = pattern_of(patterns or {}, module)
    return patterns[matching[0]] if patterns and matching else default


def _last_names(modules: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in modules})


def _other(setting: str, actual: object, expected: object) -> str:
    return f"the adapter has {setting} {actual}, but lora.{setting} is {expected}; set lora.{setting} to {actual}"
