"""Attention over examples laid end to end, each of which sees itself alone.

Nothing of size tokens x tokens is made, and no mask: where an example ends is given as boundaries. On CUDA this is one
call of PyTorch's variable-length FlashAttention; elsewhere one call of its scaled dot product attention an example.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from finetune_assets.training.model import ModelError, base_of
from finetune_assets.training.order import Examples

VARLEN = "varlen"
"""The name under which transformers knows this attention."""
TAKES_BOUNDARIES = (VARLEN, "flash_attention_2", "flash_attention_3")
"""Kinds of attention that are told where examples end, so that a batch is one row without padding."""
PACKING_TOLERANCE = 0.1
"""Largest share by which a logit may differ packed and alone: far above 16-bit rounding, far below a leak."""


class UnsupportedAttention(ValueError):
    """A model whose attention is more than this one computes."""


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **beyond: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example, as transformers' models call it.

    Args:
        module: The layer; not looked at.
        query: Shape (1, heads, tokens, width).
        key: Shape (1, key-value heads, tokens, width).
        value: As `key`.
        attention_mask: None; there is none for this kind of attention.
        scaling: Of the scores; 1 / sqrt(width) by default.
        dropout: Of the weights.
        sliding_window: How many tokens one sees, itself among them; None for all before it.
        cu_seq_lens_q: Where examples begin, and the end of the last; shape (examples + 1,), int32.
        max_length_q: Tokens of the longest example.
        beyond: Whatever else the model has for its attention.

    Returns:
        Shape (1, tokens, heads, width), and None for the weights, which are not kept.

    Raises:
        UnsupportedAttention: if the model asks for what would change the result, or tells no boundaries.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise UnsupportedAttention("the model does not pass on where examples end")
    for name in ("softcap", "s_aux", "position_bias", "indexer_mask"):
        if beyond.get(name) is not None:
            raise UnsupportedAttention(f"the model's attention has {name}")
    if beyond.get("is_causal", True) is False or attention_mask is not None:
        raise UnsupportedAttention("the model's attention is not causal alone")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0:
        return _on_cuda(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    lengths = cu_seq_lens_q.diff().tolist()
    # split, not slices: the gradient of a slice is as large as all that it was cut from
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    grouped = query.shape[1] != key.shape[1]
    seen = []
    for q, k, v in parts:
        mask = _band(q, sliding_window)
        seen.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(seen, 2).transpose(1, 2), None


def _band(query: Tensor, sliding_window: int | None) -> Tensor | None:
    """Which tokens each one sees, where it does not see all before it; (tokens, tokens), bool."""
    tokens = query.shape[2]
    if sliding_window is None or tokens <= sliding_window:
        return None
    behind = torch.arange(tokens, device=query.device)
    behind = behind[:, None] - behind[None, :]
    return (behind >= 0) & (behind < sliding_window)


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    more: dict[str, Any] = {"scale": scaling, "window_size": window}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in signature(varlen_attn).parameters:  # PyTorch 2.12
            more["enable_gqa"] = True
        else:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    seen: Any = varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **more)
    return seen[None]


AttentionInterface.register(VARLEN, varlen_attention)

Logits = Callable[[list[list[int]], bool], Tensor]
"""Computes the first row's logits, (tokens, vocabulary), of sequences of examples; in one flat row if so asked."""


@torch.no_grad()  # not inference mode: see LoraFinetune.held_out_loss
def select_attention(model: PeftModel | PreTrainedModel, wanted: str, examples: Examples, logits: Logits, packed: bool) -> bool:
    """Give the model the attention that was asked for, or `varlen` where that computes what the model's own does.

    Two examples packed are compared with the same alone, because not every attention keeps those of one row apart. The
    difference was 2 to 5 in logits where they saw one another, and 1e-6 in float32 where they did not.

    Args:
        model: The model, with whatever attention it was loaded.
        wanted: `model.attention`.
        examples: Of which the two longest are taken.
        logits: Computes a batch.
        packed: Whether sequences of several examples will come.

    Returns:
        Whether batches are to be one row with boundaries.

    Raises:
        ModelError: if examples would be packed and see one another.
    """
    model.eval()
    base, pair = base_of(model), np.argsort(examples.lengths, kind="stable")[-2:].tolist()
    alone, own = logits([pair[-1:]], False), base.config._attn_implementation

    def apart(flat: bool) -> float:
        together = logits([pair], flat)[-len(alone) :]
        return float((together - alone).abs().max() / alone.abs().max())

    if wanted == "auto":
        base.set_attn_implementation(VARLEN)
        try:
            if apart(flat=True) <= PACKING_TOLERANCE:
                return True
        except (UnsupportedAttention, TypeError):
            pass  # a model that computes more than this, or is not told where examples end
        base.set_attn_implementation(own)
    flat = wanted in TAKES_BOUNDARIES
    if packed and (share := apart(flat)) > PACKING_TOLERANCE:
        raise ModelError(
            f"data.tokenization.packing: with this model and model.attention {wanted}, packed examples see one another "
            f"(logits differ by {share:.0%}); set data.tokenization.packing to false"
        )
    return flat
