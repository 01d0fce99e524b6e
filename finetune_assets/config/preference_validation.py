"""Validates the settings of learning from preferences."""

import math
from collections.abc import Iterator

from finetune_assets.config.fields import default_of
from finetune_assets.config.preference_schema import Preference
from finetune_assets.config.raw_validation import Problem
from finetune_assets.config.schema import ExperimentConfig, Gate

OF_OBJECTIVE = {
    "dpo": ("label_smoothing", "length_normalised"),
    "kto": ("desirable_weight", "undesirable_weight"),
}
"""Settings that act with one objective only."""


def impossible_preference_settings(config: ExperimentConfig) -> Iterator[Problem]:
    """All problems of `training.preference` and of settings that an objective other than `sft` excludes."""
    objective, preference = config.training.objective, config.training.preference
    yield from _gate(config.gate, objective)
    if objective == "sft":
        if preference != Preference():
            yield "training.preference", "has no effect with training.objective sft; set it to dpo or kto"
        return
    yield from _ranges(preference)
    for other, names in OF_OBJECTIVE.items():
        for name in names if other != objective else ():
            if getattr(preference, name) != default_of(Preference.__dataclass_fields__[name]):
                yield (
                    f"training.preference.{name}",
                    f"{getattr(preference, name)} has no effect with training.objective {objective}, only with {other}",
                )
    tokens = config.data.tokenization
    if tokens.train_on_inputs:
        yield "data.tokenization.train_on_inputs", f"true cannot be used with {objective}, which compares answers alone"
    if objective == "dpo" and tokens.packing and 0 < (tokens.packing_length or 0) < 2 * tokens.cutoff_len:
        yield (
            "data.tokenization.packing_length",
            f"{tokens.packing_length} is below 2 x cutoff_len {tokens.cutoff_len}: both answers of a pair are in one "
            "sequence",
        )
    scheme = config.lora.init_lora_weights
    if preference.reference == "champion" and isinstance(scheme, str) and scheme.startswith(("pissa", "olora")):
        yield "lora.init_lora_weights", f"{scheme} changes the base weights that the champion belongs to; use true"
    if config.data.retrieval:
        yield (
            "data.retrieval",
            f"cannot be used with training.objective {objective}; put passages in the rows' contexts",
        )


def _gate(gate: Gate, objective: str) -> Iterator[Problem]:
    if not 0 <= gate.min_preference_gain < 1:
        yield "gate.min_preference_gain", f"{gate.min_preference_gain} must be a fraction from 0 to below 1"
    if not 0 <= gate.max_loss_increase < math.inf:
        yield "gate.max_loss_increase", f"{gate.max_loss_increase} must be finite and not negative"
    unused = ("min_preference_gain", "max_loss_increase") if objective == "sft" else ("min_gain",)
    for name in unused:
        if getattr(gate, name) != default_of(Gate.__dataclass_fields__[name]):
            yield f"gate.{name}", f"{getattr(gate, name)} has no effect with training.objective {objective}; remove it"


def _ranges(preference: Preference) -> Iterator[Problem]:
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        value = getattr(preference, name)
        if not (value > 0 and math.isfinite(value)):
            yield f"training.preference.{name}", f"{value} must be above 0 and finite"
    if not 0 <= preference.label_smoothing < 0.5:
        yield (
            "training.preference.label_smoothing",
            f"{preference.label_smoothing} must be from 0 to below 0.5, at which both answers are equally good",
        )
    if not (preference.instruction_weight >= 0 and math.isfinite(preference.instruction_weight)):
        yield (
            "training.preference.instruction_weight",
            f"{preference.instruction_weight} must be finite and not negative",
        )
