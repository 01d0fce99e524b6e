"""The training loss: cross-entropy summed over the tokens that are to be learned."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_assets.data.tokenization import IGNORED
from finetune_assets.training.batches import Batch


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over the batch's labelled tokens; a scalar in float32.

    `use_cache=False` matters beyond memory: transformers tells packed examples apart only where no cache is passed.
    """
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    targets = batch.labels[:, 1:]
    learned = targets != IGNORED
    return F.cross_entropy(logits[:, :-1][learned].float(), targets[learned], reduction="sum")


def learned_tokens(batch: Batch) -> int:
    """How many tokens `summed_loss` is a sum over."""
    return int(torch.count_nonzero(batch.labels[:, 1:] != IGNORED))
