"""Per-row loss of a model: cross-entropy of the answer, summed over its tokens."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.training.attention import select_attention
from finetune_assets.training.batches import collate, shortest_batch
from finetune_assets.training.loss import SummedLoss
from finetune_assets.training.model import autocast, base_of
from finetune_assets.training.order import Examples, evaluation_batches
from finetune_assets.training.precision import auto_types, compute_precision, product_shape


class RowLosses:
    """Computes the loss of rows under one model, on padding-free batches as in training where attention supports them.

    Args:
        model: The model in evaluation mode, with or without an adapter.
        config: Settings that the model was trained with.
        device: Device of the model.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, config: ExperimentConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.summed = SummedLoss(model)
        types = auto_types(config.model, config.training, device, lambda: product_shape(base_of(model).config))
        self.precision = compute_precision(config.training, types.bf16)

    @torch.inference_mode()
    def of(self, rows: Examples, progress: Callable[[int], None] = lambda done: None) -> NDArray[np.float64]:
        """Compute the loss of each row in nats, summed over its learned tokens; shape (rows,).

        Args:
            rows: At least one row.
            progress: Called after each batch with the number of rows done so far.
        """
        base = base_of(self.model)
        attention = base.config._attn_implementation
        flat = select_attention(self.model, self.config.model.attention, rows, self._logits_of(rows), packed=False)
        try:
            return self._batch_losses(rows, flat, progress)
        finally:
            # Generation uses a KV cache, which packed attention does not support
            base.set_attn_implementation(attention)

    def _batch_losses(self, rows: Examples, flat: bool, progress: Callable[[int], None]) -> NDArray[np.float64]:
        row_losses = np.zeros(len(rows))
        micro_batch_size = self.config.training.micro_batch_size
        max_length = max(self.config.data.tokenization.cutoff_len, int(rows.lengths.max()))
        (batches,) = evaluation_batches(rows, 1, micro_batch_size, micro_batch_size * max_length if flat else None)
        with autocast(self.precision, self.device):
            self.summed.check(shortest_batch(rows, self.device, flat))
        done = 0
        for sequences in batches:
            batch = collate(sequences, rows, self.device, flat)
            with autocast(self.precision, self.device):
                token_losses = self.summed.of_tokens(batch).double().cpu().numpy()
            indices = np.concatenate(sequences)
            row_losses[indices] = _group_sums(token_losses, rows.learned[indices])
            done += len(indices)
            progress(done)
        return row_losses

    def _logits_of(self, rows: Examples) -> Callable[[list[list[int]], bool], Tensor]:
        def logits(sequences: list[list[int]], flat: bool) -> Tensor:
            with autocast(self.precision, self.device):
                return self.summed.logits(collate(sequences, rows, self.device, flat))[0].float()

        return logits


def _group_sums(values: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum consecutive groups of values, group `i` having `counts[i]` values."""
    groups = np.repeat(np.arange(len(counts)), counts)
    return np.bincount(groups, values, len(counts)).astype(np.float64)
