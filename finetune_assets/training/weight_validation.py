"""Whether a base model's weights are all there and of the shapes that its configuration wants, said in one line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

LAYER = re.compile(r"^(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)\.")
Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name of a tensor, its shape in the file, and the shape that the model wants."""


def misfit(base: PreTrainedModel, info: dict[str, Any]) -> str | None:
    """What is wrong with the weights that were loaded, or None.

    transformers would only warn, and train on random weights in their place.

    Args:
        base: The model.
        info: What `from_pretrained` gives with `output_loading_info`. Tied weights are not among its missing ones.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        return f"its files lack the weight {missing[0]}{_more(missing)}; download or save the model again"
    mismatched = sorted([*info["mismatched_keys"], *_mismatched_quantized(base)])
    if mismatched:
        name, found, wanted = mismatched[0]
        return (
            f"weight {name} is {[*found]} in its files, its config.json wants {[*wanted]}{_more(mismatched)}; "
            "take the config.json that belongs to these weights"
        )
    beyond = sorted(name for name in info["unexpected_keys"] if _is_beyond(name, base.config.num_hidden_layers))
    if beyond:
        return (
            f"its files hold the weight {beyond[0]}{_more(beyond)}, its config.json says num_hidden_layers "
            f"{base.config.num_hidden_layers}; take the config.json that belongs to these weights"
        )
    return None


def _is_beyond(name: str, layers: int) -> bool:
    """Whether a weight is of a layer that the configuration does not have, so that a cut model would be trained.

    Other weights that a model has no place for (of a vision tower, say) are rightly passed over.
    """
    number = LAYER.search(name)
    return number is not None and int(number[1]) >= layers


def _mismatched_quantized(base: PreTrainedModel) -> Iterator[Mismatch]:
    """transformers 5.23 compares no shapes of weights that it quantizes."""
    for name, module in base.named_modules():
        weight: Any = getattr(module, "weight", None)
        if type(weight).__name__ not in ("Params4bit", "Int8Params"):
            continue
        found = tuple(weight.quant_state.shape if hasattr(weight, "quant_state") else weight.shape)
        wanted = (module.out_features, module.in_features)
        if found != wanted:
            yield f"{name}.weight", found, wanted


def misquantized(base: PreTrainedModel, folder: Path, wanted: str) -> str | None:
    """What is wrong with weights that are quantized in the folder already, or None.

    transformers keeps the folder's own kind where another is asked for, and reads a kind that it does not know as if
    its numbers were weights, warning alone.
    """
    stored = stored_quantization(folder)
    if stored and wanted != "none":
        return f"its weights are quantized already, which model.quantization {wanted} cannot do again; set it to none"
    if stored and getattr(base, "hf_quantizer", None) is None:
        kind = stored.get("quant_method")
        return f"its weights are quantized in a way that the installed transformers does not know ({kind})"
    return None


def stored_quantization(folder: Path) -> dict[str, Any] | None:
    """How a folder's weights are quantized already; None where they are not."""
    stored: dict[str, Any] | None = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
        "quantization_config"
    )
    return stored


def _more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def explain(error: Exception) -> str:
    """What transformers could not load, and what to do about it, in one line."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "it needs Python code of its own. Read that code, and if you trust it set model.trust_remote_code to "
            "owner/name@commit (the 40-digit commit that you have read)"
        )
    if "does not recognize this architecture" in text:
        kind = text.partition("model type `")[2].partition("`")[0]
        return f"the installed transformers knows no architecture '{kind}'; install a newer one, or take another model"
    if "Unrecognized configuration class" in text:
        kind = text.partition("<class '")[2].partition("'")[0].rpartition(".")[2]
        return f"{kind} is of no causal language model, which generates text to the right; take another model"
    return f"{type(error).__name__}: {text}"
