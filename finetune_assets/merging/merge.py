"""An adapter added into its base's weights, and how far what comes out is from the two apart."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_assets.config.schema import Merge
from finetune_assets.evaluation.contenders import Contender, LoadedModels
from finetune_assets.evaluation.rows import HeldOut
from finetune_assets.training.embeddings import resize_embeddings
from finetune_assets.training.model import autocast, compute_precision, load_base, with_adapter_of

PLACES = 16
"""Tokens of a row whose logits are compared: those of all would be gigabytes of a large vocabulary."""


@dataclass(frozen=True)
class Row:
    """A row to compare.

    Attributes:
        ids: Its tokens; shape (length,).
        places: Of which the logits are looked at; shape (places,).
    """

    ids: Tensor
    places: Tensor


@dataclass(frozen=True)
class Difference:
    """How far logits are apart.

    Attributes:
        largest: Largest absolute difference.
        mean: Mean absolute difference.
        spread: Standard deviation of the logits over the vocabulary.
        same_choice: Share of tokens whose most likely successor is the same.
        rows: How many were compared.
    """

    largest: float
    mean: float
    spread: float
    same_choice: float
    rows: int

    @property
    def share(self) -> float:
        """The mean difference as a share of the spread."""
        return self.mean / self.spread

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        return (
            f"logits of {self.rows} rows differ by {self.largest:.2e} at most and {self.mean:.2e} on average, "
            f"{self.share:.2%} of their spread; {self.same_choice:.1%} of the tokens have the same likeliest successor"
        )


def positions(rows: HeldOut, most: int) -> list[Row]:
    """The first rows, and places of their answers, evenly spread."""
    found = []
    for prompt, answer in zip(rows.prompts[:most], rows.answers[:most], strict=True):
        first, last = max(len(prompt) - 1, 0), len(prompt) + len(answer) - 1
        places = torch.linspace(first, last, min(PLACES, last - first + 1)).long()
        found.append(Row(torch.tensor(prompt + answer), places))
    return found


def reference(contender: Contender, rows: list[Row], device: torch.device) -> list[Tensor]:
    """Logits of base and adapter, apart, as they were trained; (places, vocabulary) of each row."""
    precision = compute_precision(contender.config.training, device)
    with LoadedModels(device).seated(contender) as model:
        return _logits(model, rows, device, precision)


def merged(contender: Contender, settings: Merge, output: Path) -> None:
    """Write base and adapter as one model that transformers loads.

    Args:
        contender: The adapter.
        settings: Into which base, and in which type.
        output: Folder to write.
    """
    assert contender.adapter is not None
    config = contender.config
    kept = config.model.quantization
    device = torch.device("cuda" if torch.cuda.is_available() and kept != "none" else "cpu")
    if settings.onto == "published":
        config.model.quantization = "none"
    config.model.dtype, config.training.precision = "float32", "fp32"
    base = load_base(contender.base_model, config.model, config.training, device)
    if config.model.quantization != "none":
        base = base.dequantize().float()
    config.model.quantization = kept
    tokenizer = contender.tokenizer()
    resize_embeddings(base, tokenizer, config)
    model = with_adapter_of(base, contender.adapter)
    whole = model.merge_and_unload(safe_merge=True).to(getattr(torch, settings.dtype))
    whole.save_pretrained(output)
    tokenizer.save_pretrained(output)


def compare(folder: Path, rows: list[Row], wanted: list[Tensor], device: torch.device) -> Difference:
    """The merged model's logits beside those of base and adapter."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map={"": device}, local_files_only=True, use_safetensors=True
    )
    found = _logits(model.eval(), rows, device, "as stored")
    apart = [(one - other).abs() for one, other in zip(found, wanted, strict=True)]
    total = sum(part.numel() for part in apart)
    same = [one.argmax(-1) == other.argmax(-1) for one, other in zip(found, wanted, strict=True)]
    return Difference(
        largest=max(float(part.max()) for part in apart),
        mean=sum(float(part.double().sum()) for part in apart) / total,
        spread=float(torch.stack([logits.std(-1).mean() for logits in wanted]).mean()),
        same_choice=sum(int(part.sum()) for part in same) / sum(part.numel() for part in same),
        rows=len(rows),
    )


@torch.inference_mode()
def _logits(model: PreTrainedModel | Any, rows: list[Row], device: torch.device, precision: str) -> list[Tensor]:
    found = []
    for row in rows:
        with autocast(precision, device):
            logits = model(input_ids=row.ids[None].to(device), use_cache=False).logits[0]
        found.append(logits[row.places.to(device)].float().cpu())
    return found
