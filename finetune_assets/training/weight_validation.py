"""Validation of a base model's weights against its configuration, with one-line error descriptions."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

LAYER = re.compile(r"^(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)\.")
Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name of a tensor, its shape in the file, and the shape that the model requires."""


def misfit(base: PreTrainedModel, info: dict[str, Any]) -> str | None:
    """Describe missing, mismatched or surplus weights of a loaded model; None if the weights are valid.

    transformers only logs a warning, and initializes such weights randomly.

    Args:
        base: The loaded model.
        info: Loading info returned by `from_pretrained` with `output_loading_info`; its missing keys exclude tied
            weights.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        return f"weight {missing[0]}{_more(missing)} is missing from its files; download or save the model again"
    mismatched = sorted([*info["mismatched_keys"], *_mismatched_quantized(base)])
    if mismatched:
        name, actual, expected = mismatched[0]
        return (
            f"weight {name} has shape {[*actual]} in its files, but config.json requires {[*expected]}"
            f"{_more(mismatched)}; use the config.json that belongs to these weights"
        )
    surplus = sorted(name for name in info["unexpected_keys"] if _is_surplus(name, base.config.num_hidden_layers))
    if surplus:
        return (
            f"its files contain weight {surplus[0]}{_more(surplus)}, but config.json sets num_hidden_layers "
            f"{base.config.num_hidden_layers}; use the config.json that belongs to these weights"
        )
    return None


def _is_surplus(name: str, layers: int) -> bool:
    """Whether a weight belongs to a layer beyond the configured number, so that a truncated model would be trained.

    Other unexpected weights (of a vision tower, for example) are ignored.
    """
    number = LAYER.search(name)
    return number is not None and int(number[1]) >= layers


def _mismatched_quantized(base: PreTrainedModel) -> Iterator[Mismatch]:
    """Compare shapes of quantized weights, which transformers 5.23 does not check."""
    for name, module in base.named_modules():
        weight: Any = getattr(module, "weight", None)
        if type(weight).__name__ not in ("Params4bit", "Int8Params"):
            continue
        actual = tuple(weight.quant_state.shape if hasattr(weight, "quant_state") else weight.shape)
        expected = (module.out_features, module.in_features)
        if actual != expected:
            yield f"{name}.weight", actual, expected


def misquantized(base: PreTrainedModel, folder: Path, wanted: str) -> str | None:
    """Describe a conflict with the quantization of weights that are stored quantized; None if there is no conflict.

    transformers keeps the stored quantization if the settings request another one. For an unknown quantization method
    it only logs a warning, and reads the quantized values as weights.
    """
    stored = stored_quantization(folder)
    if stored and wanted != "none":
        return (
            f"its weights are already quantized, so model.quantization {wanted} cannot be applied; "
            "set model.quantization to none"
        )
    if stored and getattr(base, "hf_quantizer", None) is None:
        kind = stored.get("quant_method")
        return f"its weights use a quantization method that the installed transformers does not support ({kind})"
    return None


def stored_quantization(folder: Path) -> dict[str, Any] | None:
    """Read the quantization config of a folder's weights; None if they are not quantized."""
    stored: dict[str, Any] | None = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
        "quantization_config"
    )
    return stored


def _more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def explain(error: Exception) -> str:
    """Convert a loading error of transformers to one line with its cause and fix."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "it requires custom Python code. Review the code, and if you trust it set model.trust_remote_code to "
            "owner/name@commit (the 40-digit commit that you reviewed)"
        )
    if "does not recognize this architecture" in text:
        kind = text.partition("model type `")[2].partition("`")[0]
        return f"the installed transformers does not support architecture '{kind}'; upgrade it, or use another model"
    if "Unrecognized configuration class" in text:
        kind = text.partition("<class '")[2].partition("'")[0].rpartition(".")[2]
        return f"{kind} has no causal language model (text generation from left to right); use another model"
    return f"{type(error).__name__}: {text}"
