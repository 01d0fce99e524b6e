"""The training loss: cross-entropy summed over the target tokens."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from finetune_assets.training.batches import Batch
from finetune_assets.training.model import base_of
from finetune_assets.training.precision import cpu_instructions

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Maximum bytes of float32 logits per chunk. On a CPU a chunk of this size stays in the cache: 256 tokens of a
vocabulary of 16k took 0.34 s, all 900 at once 0.45 s."""
TOLERANCE = 1e-2
"""Largest relative difference from the model's own loss that rounding can explain."""


class SummedLoss(nn.Module):
    """Summed cross-entropy in nats over the target tokens of a batch, without storing the logits of all tokens.

    The decoder computes hidden states, and only those with a target token go through the output layer, in chunks. The
    implementation (`way`) depends on the model:

    - `fused`: the output layer is frozen and plain, so PyTorch's `linear_cross_entropy` computes loss and gradient of a
      chunk at once (PyTorch 2.13).
    - `chunked`: the output layer is trained, has a bias, or caps its logits; each chunk is recomputed in the backward
      pass.
    - `whole`: the model has unknown operations between hidden states and logits, so the model's own logits are used.

    Args:
        model: Base model, with or without an adapter.
    """

    def __init__(self, model: PeftModel | PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        base = base_of(model)
        self.decoder, self.head = base.get_decoder(), base.get_output_embeddings()
        self.softcap = getattr(base.config, "final_logit_softcapping", None)
        self.simulated_device: str | None = None
        """Device type that determines chunks and data types; None for the device of the hidden states."""
        self.way = "chunked"
        frozen = type(self.head) is nn.Linear and not self.head.weight.requires_grad and self.head.bias is None
        if frozen and not self.softcap and hasattr(F, "linear_cross_entropy"):
            self.way = "fused"

    def forward(self, batch: Batch, by_token: bool = False) -> Tensor:
        """Compute the summed loss as a float32 scalar; zero for a batch without target tokens.

        Args:
            batch: The batch.
            by_token: Compute the loss of each target token instead, in the order of the batch; shape (learned,).
        """
        reduction = "none" if by_token else "sum"
        if self.way == "whole":
            logits = self.logits(batch).flatten(0, 1)[batch.learned]
            return F.cross_entropy(logits.float(), batch.targets, reduction=reduction)
        hidden = self.decoder(**batch.inputs).last_hidden_state.flatten(0, 1)[batch.learned]
        rows, learns = self._chunk(hidden), torch.is_grad_enabled()
        if self.way == "fused" and by_token and learns:
            losses: Tensor = _TokenLosses.apply(*self._cast(hidden), batch.targets, rows)
            return losses
        if self.way == "fused" and not by_token and (learns or not hidden.is_cuda):
            return self._fused(hidden, batch.targets, rows)
        loss = partial(self._loss, reduction=reduction)
        loss = partial(checkpoint, loss, use_reentrant=False) if learns else loss
        chunks = [loss(*chunk) for chunk in zip(hidden.split(rows), batch.targets.split(rows), strict=True)]
        return torch.cat(chunks) if by_token else torch.stack(chunks).sum()

    @torch.no_grad()
    def of_tokens(self, batch: Batch) -> Tensor:
        """Compute the loss of each target token without gradient, in the order of the batch; shape (learned,)."""
        losses: Tensor = self(batch, by_token=True)
        return losses

    def logits(self, batch: Batch) -> Tensor:
        """Compute the model's own logits; shape (rows, length, vocabulary)."""
        return self.model(**batch.inputs).logits

    def _chunk(self, hidden: Tensor) -> int:
        size = CHUNK_BYTES.get(self.simulated_device or hidden.device.type, CHUNK_BYTES["cuda"])
        return max(16, size // (4 * self.head.weight.shape[0]))

    def _cast(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and the weight of the output layer in the type in which they are multiplied."""
        kind, weight = hidden.device.type, self.head.weight
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        has_instructions = hidden.dtype == torch.bfloat16 and cpu_instructions()
        if (self.simulated_device or kind) == "cpu" and not has_instructions:
            hidden, weight = hidden.float(), weight.float()
        return hidden, weight

    def _fused(self, hidden: Tensor, targets: Tensor, rows: int) -> Tensor:
        kind = self.simulated_device or hidden.device.type
        # On a CPU in float32, because the library would round the summed loss to 16 bits, by up to 0.4%
        hidden, weight = self._cast(hidden)
        if kind == "cpu" and hidden.dtype == torch.bfloat16:
            losses: Tensor = _TokenLosses.apply(hidden, weight, targets, rows)
            return losses.sum()
        # On a CPU the other policies multiply in emulated 16-bit precision, 20 to 50 times slower
        options = nn.LinearCrossEntropyOptions(
            chunking_method=None, batch_chunk_size=rows, acc_policy="accurate" if kind == "cpu" else "auto"
        )
        summed = partial(F.linear_cross_entropy, reduction="sum", options=options)
        if hidden.dtype == torch.float32:
            return summed(hidden, weight, targets)
        # In bfloat16 the result is rounded, by up to 0.4%, and so is the sum after each chunk: a call for each chunk
        parts = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.stack([summed(part, weight, target).float() for part, target in parts]).sum()

    def _loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits = self.head(hidden).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits, targets, reduction=reduction)

    @torch.no_grad()
    def check(self, batch: Batch) -> None:
        """Fall back to `whole` if the loss on a batch differs from the loss of the model's own logits."""
        loss, self.way, chosen = self(batch), "whole", self.way
        if (loss - self(batch)).abs() <= TOLERANCE * loss.abs():
            self.way = chosen


class _TokenLosses(torch.autograd.Function):
    """Loss of each target token of a frozen output layer, and its gradient, multiplied in the type of the weight.

    A token's loss depends on its own hidden state alone, so the gradient of any function of the losses is the gradient
    of each loss, computed in the forward pass, times a number. Softmax and loss are computed in float32. With bfloat16
    instructions the sum of these losses takes a third to half of the time of `linear_cross_entropy`, which on a CPU
    copies bfloat16 weights to float32 in every call, and multiplies in float32 (PyTorch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part, target = slice(start, start + rows), targets[start : start + rows, None]
            log_probabilities = F.log_softmax(F.linear(hidden[part], weight), -1, dtype=torch.float32)
            losses[part] = -log_probabilities.gather(1, target)[:, 0]
            if gradient is not None:
                difference = log_probabilities.exp_()
                difference.scatter_add_(1, target, difference.new_full(target.shape, -1))
                torch.mm(difference.to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None, None
