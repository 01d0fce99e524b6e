"""One training step on tensors without data: what it keeps and how high it rises, whatever the architecture.

The trainer's own model, adapter and loss are run forward and backward on PyTorch's fake tensors, which have shapes and
types and no memory, and every storage that comes and goes is counted. A deep model is simulated with fewer layers, at
two depths: what a layer adds is the same for each.
"""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.training.batches import Batch
from finetune_assets.training.lora import speed_up
from finetune_assets.training.loss import SummedLoss
from finetune_assets.training.model import autocast, base_of, peft_config, trainable

SIMULATED = "simulated"
"""The name under which transformers knows the attention of a simulation."""
DEPTHS = (6, 12)
"""Layers of the two models by which a deeper one is judged; patterns of two, three or six kinds of layers fit."""


@dataclass(frozen=True)
class Simulated:
    """What one micro-batch needs beside weights, gradients and optimizer, in bytes.

    Attributes:
        kept: By the backward pass, of the forward pass: the activations.
        peak: The highest there is at once, activations included.
    """

    kept: float
    peak: float

    def beyond(self, other: "Simulated", layers: int, more: int) -> "Simulated":
        """With `more` layers added, of which the difference to `other` is so many."""
        return Simulated(
            self.kept + (self.kept - other.kept) / layers * more, self.peak + (self.peak - other.peak) / layers * more
        )


def simulate(
    shape: PretrainedConfig,
    experiment: ExperimentConfig,
    dtype: torch.dtype,
    lengths: list[int],
    learned: int,
    device: str,
    precision: str,
    checkpointing: bool,
) -> Simulated:
    """Simulate a micro-batch.

    Args:
        shape: The base model's configuration.
        experiment: The settings.
        dtype: Of the base's weights, and what quantized ones are computed in.
        lengths: Tokens of its examples, which lie end to end.
        learned: How many of all their tokens are learned.
        device: `cpu` or `cuda`; nothing is asked of it.
        precision: As `compute_precision` says.
        checkpointing: Whether activations are computed twice.
    """

    def of(layers: int | None) -> Simulated:
        model = on_meta(shape, experiment, dtype, layers)
        return _step(model, lengths, learned, device, precision, checkpointing)

    depth = getattr(shape, "num_hidden_layers", 0)
    shallow, deep = DEPTHS
    by_layer = experiment.lora.layers_to_transform is not None
    if depth <= deep + shallow or by_layer:
        return of(None)
    return of(deep).beyond(of(shallow), deep - shallow, depth - deep)


def on_meta(
    shape: PretrainedConfig, experiment: ExperimentConfig, dtype: torch.dtype, layers: int | None = None
) -> PeftModel:
    """The model with its adapter as shapes alone, of fewer layers where that is asked for."""
    base = base_on_meta(shape, experiment, dtype, layers)
    mixed = not experiment.training.precision.startswith("full_")
    with torch.device("meta"):
        if experiment.model.quantization != "none":
            quantized(base, experiment.model.quantization)
        return get_peft_model(
            base, peft_config(experiment.lora, base), autocast_adapter_dtype=mixed, low_cpu_mem_usage=True
        )


def base_on_meta(
    shape: PretrainedConfig, experiment: ExperimentConfig, dtype: torch.dtype, layers: int | None = None
) -> PreTrainedModel:
    """The base alone, as it was published."""
    shape = copy.deepcopy(shape)
    if layers is not None:
        shape.num_hidden_layers = layers
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[:layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            shape, dtype=dtype, trust_remote_code=bool(experiment.model.trust_remote_code)
        )


def _step(
    model: PeftModel,
    lengths: list[int],
    learned: int,
    device: str,
    precision: str,
    checkpointing: bool,
) -> Simulated:
    tokens = sum(lengths)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    AttentionInterface.register(SIMULATED, _attention(lengths, device))
    with fake:
        model.to_empty(device="cpu")
        speed_up(model)
        loss = SummedLoss(model)
        loss.chunks_on = device
        base = base_of(model)
        base.set_attn_implementation(SIMULATED)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        model.train()
        ids = torch.zeros(1, tokens, dtype=torch.long)
        at = torch.zeros(learned, dtype=torch.long)
        batch = Batch(
            ids, torch.zeros_like(ids), torch.zeros(len(lengths) + 1, dtype=torch.int32), max(lengths), at, at, tokens
        )
        there = [*model.parameters(), *model.buffers()]
        for parameter in trainable(model):
            parameter.grad = torch.zeros_like(parameter)
            there.append(parameter.grad)
        with _Counting(there) as counting:
            with autocast(precision, torch.device("cpu")):
                total = loss(batch)
            kept = counting.now
            total.backward()
        return Simulated(kept, counting.peak)


class _Counting(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, but for those that were there before."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


# ---- what stands for kernels that fake tensors do not run


def _attention(lengths: list[int], device: str) -> Callable[..., tuple[Tensor, None]]:
    """What `varlen_attention` does, with boundaries that are known beforehand."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        if device == "cuda":
            return _Flash.apply(query, key, value).transpose(1, 2), None
        grouped = query.shape[1] != key.shape[1]
        parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        seen = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=grouped) for part in parts]
        return torch.cat(seen, 2).transpose(1, 2), None

    return attention


class _Flash(torch.autograd.Function):
    """Memory of FlashAttention: the output and a number a token and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def quantized(base: nn.Module, kind: str) -> None:
    """Have the layers that bitsandbytes would quantize compute with as much memory as its own do."""
    output = base.get_output_embeddings()  # type: ignore[operator]
    for module in [*base.modules()]:
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not output:
                made = QuantizedLinear(
                    child.in_features, child.out_features, child.bias is not None, dtype=child.weight.dtype
                )
                made.kind = kind
                made.requires_grad_(False)
                setattr(module, name, made)


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is made anew in every pass."""

    kind = "nf4"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Dequantized.apply(x, self.weight, self.kind)
        return out if self.bias is None else out + self.bias


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(weight)
        if kind == "int8":
            # The input in 8 bits, the product in 32
            _ = x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.int32)
            return x.new_empty((*x.shape[:-1], weight.shape[0]))
        return x @ torch.empty_like(weight, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ torch.empty_like(weight, dtype=gradients[0].dtype), None, None
