"""Merge an adapter into the weights of its base model, and measure how far the logits change."""

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
from finetune_assets.training.generation_files import save_generation_files
from finetune_assets.training.model import autocast, base_of, with_adapter_of
from finetune_assets.training.precision import auto_types, compute_precision, product_shape

PLACES = 16
"""Positions per row at which logits are compared; all positions would take gigabytes with a large vocabulary."""


@dataclass(frozen=True)
class Row:
    """A row to compare.

    Attributes:
        ids: Token ids; shape (length,).
        places: Positions at which logits are compared; shape (places,).
    """

    ids: Tensor
    places: Tensor


@dataclass(frozen=True)
class LogitDifference:
    """Difference between two sets of logits.

    Attributes:
        largest: Largest absolute difference.
        mean: Mean absolute difference.
        spread: Standard deviation of the logits over the vocabulary, averaged over positions.
        same_choice: Share of positions with the same most likely next token.
        rows: Number of rows compared.
    """

    largest: float
    mean: float
    spread: float
    same_choice: float
    rows: int

    @property
    def share(self) -> float:
        """Mean difference relative to the spread."""
        return self.mean / self.spread

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        return (
            f"logits of {self.rows} rows differ by {self.largest:.2e} at most and {self.mean:.2e} on average, "
            f"{self.share:.2%} of their spread; top-1 next token agrees at {self.same_choice:.1%} of positions"
        )


def positions(rows: HeldOut, most: int) -> list[Row]:
    """Return the first `most` rows with up to `PLACES` evenly spaced positions of their answers."""
    selected = []
    for prompt, answer in zip(rows.prompts[:most], rows.answers[:most], strict=True):
        first, last = max(len(prompt) - 1, 0), len(prompt) + len(answer) - 1
        places = torch.linspace(first, last, min(PLACES, last - first + 1)).long()
        selected.append(Row(torch.tensor(prompt + answer), places))
    return selected


def reference(contender: Contender, rows: list[Row], device: torch.device) -> list[Tensor]:
    """Compute logits of the unmerged base plus adapter, in the training precision; (places, vocabulary) per row."""
    training = contender.config.training
    if training.precision == "auto" and device.type == "cpu":
        training.precision = "fp32"  # a few rows, whose differences are to be those of the merge alone
    with LoadedModels(device).loaded(contender) as model:
        types = auto_types(contender.config.model, training, device, lambda: product_shape(base_of(model).config))
        return _logits(model, rows, device, compute_precision(training, types.bf16))


def merged(contender: Contender, settings: Merge, output: Path) -> None:
    """Merge base and adapter, and save the result as a model that transformers can load.

    Args:
        contender: The adapter.
        settings: Weights to merge into, and the dtype to save.
        output: Folder to write to.
    """
    assert contender.adapter is not None
    config = contender.config
    quantization = config.model.quantization
    device = torch.device("cuda" if torch.cuda.is_available() and quantization != "none" else "cpu")
    if settings.onto == "published":
        config.model.quantization = "none"
    config.model.dtype, config.training.precision = "float32", "fp32"
    base = contender.load_base(device)
    if config.model.quantization != "none":
        base = base.dequantize().float()
    config.model.quantization = quantization
    tokenizer = contender.tokenizer()
    resize_embeddings(base, tokenizer, config)
    model = with_adapter_of(base, contender.adapter)
    merged_model = model.merge_and_unload(safe_merge=True).to(getattr(torch, settings.dtype))
    merged_model.save_pretrained(output)
    save_generation_files(output, contender.base_model, tokenizer, config)


def compare(
    folder: Path, rows: list[Row], wanted: list[Tensor], device: torch.device, own_code: bool = False
) -> LogitDifference:
    """Compare the logits of the merged model with the `wanted` logits of base plus adapter.

    Args:
        folder: Folder of the merged model.
        rows: Rows to compare.
        wanted: Logits of base plus adapter.
        device: Device to compute on.
        own_code: Run the Python code of the base model, which is saved with the merged model.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map={"": device},
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=own_code,
    )
    return difference(model, rows, wanted, device)


def difference(
    model: PreTrainedModel | Any, rows: list[Row], wanted: list[Tensor], device: torch.device
) -> LogitDifference:
    """Compare the logits of a model with the `wanted` logits."""
    merged_logits = _logits(model.eval(), rows, device, "as stored")
    differences = [(actual - expected).abs() for actual, expected in zip(merged_logits, wanted, strict=True)]
    total = sum(part.numel() for part in differences)
    same = [actual.argmax(-1) == expected.argmax(-1) for actual, expected in zip(merged_logits, wanted, strict=True)]
    return LogitDifference(
        largest=max(float(part.max()) for part in differences),
        mean=sum(float(part.double().sum()) for part in differences) / total,
        spread=float(torch.stack([logits.std(-1).mean() for logits in wanted]).mean()),
        same_choice=sum(int(part.sum()) for part in same) / sum(part.numel() for part in same),
        rows=len(rows),
    )


@torch.inference_mode()
def _logits(model: PreTrainedModel | Any, rows: list[Row], device: torch.device, precision: str) -> list[Tensor]:
    row_logits = []
    for row in rows:
        with autocast(precision, device):
            logits = model(input_ids=row.ids[None].to(device), use_cache=False).logits[0]
        row_logits.append(logits[row.places.to(device)].float().cpu())
    return row_logits
