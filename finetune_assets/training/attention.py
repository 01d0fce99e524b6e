"""Variable-length causal attention over concatenated examples; attention never crosses an example boundary.

Example boundaries are passed instead of a mask, so nothing of size tokens x tokens is allocated. On CUDA this is one
call of PyTorch's variable-length FlashAttention; on other devices, one call of its scaled dot product attention per
example.
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
from finetune_assets.training.precision import cpu_instructions

VARLEN = "varlen"
"""Name under which this attention is registered with transformers."""
TAKES_BOUNDARIES = (VARLEN, "flash_attention_2", "flash_attention_3")
"""Attention implementations that accept example boundaries, so that a batch is one row without padding."""
PACKING_TOLERANCE = 0.1
"""Largest relative difference between packed and unpacked logits: far above 16-bit rounding, far below a leak."""


class UnsupportedAttention(ValueError):
    """The model's attention uses features that `varlen_attention` does not implement."""


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each example, with the signature that transformers expects.

    Args:
        module: The attention layer; unused.
        query: Shape (1, heads, tokens, width).
        key: Shape (1, key-value heads, tokens, width).
        value: Same shape as `key`.
        attention_mask: Must be None; boundaries replace the mask.
        scaling: Scale of the attention scores; 1 / sqrt(width) by default.
        dropout: Dropout probability of the attention weights.
        sliding_window: Number of tokens that a token attends to, itself included; None for all previous tokens.
        cu_seq_lens_q: Start of each example, and the end of the last; shape (examples + 1,), int32.
        max_length_q: Length of the longest example, in tokens.
        kwargs: Other arguments that the model passes to its attention.

    Returns:
        The output, shape (1, tokens, heads, width), and None for the attention weights, which are not computed.

    Raises:
        UnsupportedAttention: if the model requires an unsupported feature, or passes no boundaries.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise UnsupportedAttention(
            "the model does not pass example boundaries (cu_seq_lens_q, max_length_q) to its attention"
        )
    for name in ("softcap", "s_aux", "position_bias", "indexer_mask"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"the model's attention uses {name}, which {VARLEN} does not support")
    if kwargs.get("is_causal", True) is False or attention_mask is not None:
        raise UnsupportedAttention("the model's attention is not purely causal")
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # float32 rotary embeddings promote query and key
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0:
        return _flash_varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    lengths = cu_seq_lens_q.diff().tolist()
    return attention_by_example(query, key, value, lengths, scaling, dropout, sliding_window), None


def attention_by_example(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
) -> Tensor:
    """Compute causal attention with one call per example, for devices without a variable-length kernel.

    The arguments are those of `varlen_attention`, with the lengths of the examples. The output has shape
    (1, tokens, heads, width).
    """
    if not _is_faster_in_float32(value):
        return _by_example(query, key, value, lengths, scaling, dropout, sliding_window)
    with torch.autocast("cpu", enabled=False):
        inputs = query.float(), key.float(), value.float()
        return _by_example(*inputs, lengths, scaling, dropout, sliding_window).to(value.dtype)


def _is_faster_in_float32(value: Tensor) -> bool:
    """Whether bfloat16 attention is slower than float32 on this device.

    The CPU kernel multiplies many small blocks. In bfloat16, forward and backward of 9 heads took 3.0 to 5.4 times as
    long on a CPU without instructions for it. With AVX512-bf16, attention took 38% of a training, and all matrix
    products 35%. AMX has a kernel of its own, which was not measured.

    Args:
        value: The values. Under autocast with float32 weights, they are bfloat16, and queries and keys are float32.
    """
    return value.device.type == "cpu" and value.dtype == torch.bfloat16 and cpu_instructions() != "amx_bf16"


def _by_example(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    # split, not slices: the gradient of a slice is as large as the whole tensor
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in parts:
        mask = _sliding_window_mask(q, sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def _sliding_window_mask(query: Tensor, sliding_window: int | None) -> Tensor | None:
    """Boolean mask of shape (tokens, tokens); None if the window covers all previous tokens."""
    tokens = query.shape[2]
    if sliding_window is None or tokens <= sliding_window:
        return None
    positions = torch.arange(tokens, device=query.device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _flash_varlen(
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
    options: dict[str, Any] = {"scale": scaling, "window_size": window}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in signature(varlen_attn).parameters:  # PyTorch 2.12
            options["enable_gqa"] = True
        else:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    output: Any = varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **options)
    return output[None]


AttentionInterface.register(VARLEN, varlen_attention)

Logits = Callable[[list[list[int]], bool], Tensor]
"""Computes the logits of the first row, shape (tokens, vocabulary); the second argument selects one flat row."""


@torch.no_grad()  # not inference mode: see LoraFinetune.held_out_loss
def select_attention(
    model: PeftModel | PreTrainedModel, wanted: str, examples: Examples, logits: Logits, packed: bool
) -> bool:
    """Select the attention implementation: `varlen` for `auto` where it matches the model's own, else as loaded.

    The logits of two packed examples are compared with those of the unpacked example, because not every attention
    implementation isolates the examples of a row. The logits differed by 2 to 5 where packed examples attended to one
    another, and by 1e-6 in float32 where they did not.

    Args:
        model: The model, with the attention implementation that it was loaded with.
        wanted: The setting `model.attention`.
        examples: Dataset; its two longest examples are compared.
        logits: Computes the logits of a batch.
        packed: Whether the dataset has sequences of several examples.

    Returns:
        Whether batches must be one row with boundaries.

    Raises:
        ModelError: if examples are packed and would attend to one another.
    """
    model.eval()
    base, pair = base_of(model), np.argsort(examples.lengths, kind="stable")[-2:].tolist()
    alone, original = logits([pair[-1:]], False), base.config._attn_implementation

    def packing_difference(flat: bool) -> float:
        packed_logits = logits([pair], flat)[-len(alone) :]
        return float((packed_logits - alone).abs().max() / alone.abs().max())

    if wanted == "auto":
        base.set_attn_implementation(VARLEN)
        try:
            if packing_difference(flat=True) <= PACKING_TOLERANCE:
                return True
        except (UnsupportedAttention, TypeError):
            pass  # the model's attention has other features, or the model passes no boundaries
        base.set_attn_implementation(original)
    flat = wanted in TAKES_BOUNDARIES
    if packed and (difference := packing_difference(flat)) > PACKING_TOLERANCE:
        raise ModelError(
            f"data.tokenization.packing: with this model and model.attention {wanted}, packed examples attend to one "
            f"another (logits differ by {difference:.0%}); set data.tokenization.packing to false"
        )
    return flat
