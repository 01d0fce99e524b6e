"""LoRA layers that compute what PEFT's do, with less.

PEFT makes five tensors of a layer's full width a call: the input after dropout, the update, the update scaled, the sum,
and going backward the gradient scaled. Here the update is added to the layer's output where it lies, and the input is
kept once for all the layers that read it. After Unsloth's "fast LoRA" and the manual gradients of arXiv:2312.03415.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

KINDS = ("Linear", "Linear4bit", "Linear8bitLt")
"""Names of PEFT's layers that are plain: an output of the base, and an update of it."""


def use_fused_lora(model: nn.Module, adapter: str = "default") -> int:
    """Have plain LoRA layers compute in this way, in training and in evaluation.

    Args:
        model: A model with an adapter.
        adapter: Its name.

    Returns:
        How many layers it is.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module, adapter)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward, adapter)
    return len(layers)


def _is_plain(layer: LoraLayer, adapter: str) -> bool:
    return (
        type(layer).__name__ in KINDS
        and [*layer.lora_A] == [adapter]
        and not layer.lora_variant
        and layer.lora_B[adapter].bias is None
        and isinstance(layer.lora_dropout[adapter], nn.Dropout | nn.Identity)
    )


def _forward(layer: Any, own: Any, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer.disable_adapters or layer.merged or args or kwargs:
        return own(x, *args, **kwargs)
    result = layer.base_layer(x)
    dropout = layer.lora_dropout[adapter]
    share = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dtype = result.dtype
    return _Update.apply(result, x.to(dtype), a.to(dtype), b.to(dtype), layer.scaling[adapter], share)


class _Update(torch.autograd.Function):
    """result + scaling * dropout(x) A^T B^T, in the memory of `result` where that may be written to."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float) -> Tensor:
        kept = kept_by_dropout(x, dropout) if dropout else None
        inner = _dropped(x, kept).flatten(0, -2) @ a.t()
        scaling = scaling / (1 - dropout)
        if result._is_view():  # bitsandbytes' own function gives one where the layer has a bias, not to be written to
            result = torch.addmm(result.flatten(0, -2), inner, b.t(), alpha=scaling).view_as(result)
        else:
            result.flatten(0, -2).addmm_(inner, b.t(), alpha=scaling)
            ctx.mark_dirty(result)
        ctx.save_for_backward(x, a, b, inner, kept)
        ctx.scaling = scaling
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, inner, kept = ctx.saved_tensors
        flat = gradients[0].flatten(0, -2)
        of_inner = (flat @ b).mul_(ctx.scaling)
        of_a = of_inner.t() @ _dropped(x, kept).flatten(0, -2)
        of_b = (inner.t() @ flat).t().mul_(ctx.scaling)  # half the time of flat.t() @ inner on a CPU
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = _dropped((of_inner @ a).view_as(x), kept)
        return gradients[0], of_x, of_a, of_b, None, None


def _dropped(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else torch.where(kept, x, x.new_zeros(()))


def kept_by_dropout(x: Tensor, share: float) -> Tensor:
    """Which elements dropout keeps; bool, of the shape of `x`.

    On a CPU, 16 random bits an element out of 64-bit draws take a quarter of the time of `bernoulli_`, which was a
    ninth of all training; the share is met to 1 / 65,536.
    """
    if x.device.type != "cpu":
        return torch.rand(x.shape, device=x.device) >= share
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.int16)[: x.numel()] >= round(share * 2**16) - 2**15).view(x.shape)
