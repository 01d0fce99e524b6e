"""What a model loses on each row: the cross-entropy of its answer, summed over its tokens."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.training.attention import select_attention
from finetune_assets.training.batches import collate
from finetune_assets.training.loss import SummedLoss
from finetune_assets.training.model import autocast, base_of, compute_precision
from finetune_assets.training.order import Examples, evaluation_batches


class RowLosses:
    """Measures rows with one model, as training computes them: examples end to end, without padding, where that holds.

    Args:
        model: In evaluation mode, with or without an adapter.
        config: The settings that it was trained with.
        device: Where it is.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, config: ExperimentConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.summed = SummedLoss(model)
        self.precision = compute_precision(config.training, device)

    @torch.inference_mode()
    def of(self, rows: Examples, progress: Callable[[int], None] = lambda done: None) -> NDArray[np.float64]:
        """The loss of each row in nats, summed over its learned tokens; shape (rows,).

        Args:
            rows: At least one.
            progress: Told the rows done after every batch.
        """
        base = base_of(self.model)
        own = base.config._attn_implementation
        flat = select_attention(self.model, self.config.model.attention, rows, self._logits_of(rows), packed=False)
        try:
            return self._measured(rows, flat, progress)
        finally:
            base.set_attn_implementation(own)  # generation has a cache, which packed attention has not

    def _measured(self, rows: Examples, flat: bool, progress: Callable[[int], None]) -> NDArray[np.float64]:
        found = np.zeros(len(rows))
        micro = self.config.training.micro_batch_size
        longest = max(self.config.data.tokenization.cutoff_len, int(rows.lengths.max()))
        (batches,) = evaluation_batches(rows, 1, micro, micro * longest if flat else None)
        done = 0
        for number, sequences in enumerate(batches):
            batch = collate(sequences, rows, self.device, flat)
            with autocast(self.precision, self.device):
                if number == 0:
                    self.summed.check(batch)
                losses = self.summed.of_tokens(batch).double().cpu().numpy()
            members = np.concatenate(sequences)
            found[members] = _sums(losses, rows.learned[members])
            done += len(members)
            progress(done)
        return found

    def _logits_of(self, rows: Examples) -> Callable[[list[list[int]], bool], Tensor]:
        def logits(sequences: list[list[int]], flat: bool) -> Tensor:
            with autocast(self.precision, self.device):
                return self.summed.logits(collate(sequences, rows, self.device, flat))[0].float()

        return logits


def _sums(values: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of consecutive groups of so many values each."""
    groups = np.repeat(np.arange(len(counts)), counts)
    return np.bincount(groups, values, len(counts)).astype(np.float64)
