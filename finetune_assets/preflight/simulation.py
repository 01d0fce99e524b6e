"""Simulate one training step on fake tensors to measure activation and peak memory, for any architecture.

The trainer's own model, adapter and loss run forward and backward on PyTorch's fake tensors, which have shapes and
dtypes but no memory; every storage allocated and freed is counted. A deep model is simulated at two depths and
extrapolated: each layer adds the same amount, or the amounts repeat after a few layers.
"""

import copy
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from finetune_assets.config.schema import Lora
from finetune_assets.preflight.case import NotSimulated, Question, Simulated
from finetune_assets.training.attention import attention_by_example
from finetune_assets.training.batches import Batch
from finetune_assets.training.lora import use_fused_lora
from finetune_assets.training.lora_names import lora_problem
from finetune_assets.training.loss import SummedLoss
from finetune_assets.training.model import autocast, base_of, layers_of, peft_config, trainable
from finetune_assets.training.telemetry import multiplied_weights

SIMULATED = "simulated"
"""Name of the simulated attention in the transformers `AttentionInterface`."""
LONGEST_PATTERN = 8
"""Maximum length of a repeating pattern of layer kinds; a model without such a pattern is simulated at full depth."""


def simulated(shape: PretrainedConfig, question: Question) -> Simulated:
    """Simulate a micro-batch of a model.

    Raises:
        NotSimulated: if the model cannot be simulated.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs a traceback; NotSimulated has the message
    try:
        return _extrapolated(shape, question)
    except NotSimulated:
        raise
    except Exception as e:
        raise NotSimulated.because(e) from e
    finally:
        log.setLevel(level)


def multiplied_weights_of(shape: PretrainedConfig, question: Question) -> int:
    """Return the number of weights that each token is multiplied with.

    Raises:
        NotSimulated: if the model class cannot be built on the meta device.
    """
    return multiplied_weights(base_on_meta(shape, question))


def lora_problem_of(shape: PretrainedConfig, question: Question) -> str | None:
    """Return the first name in the `lora` settings that selects nothing in the model; None if all do.

    Raises:
        NotSimulated: if the model class cannot be built on the meta device.
    """
    return lora_problem(question.lora, base_on_meta(shape, question))


def _extrapolated(shape: PretrainedConfig, question: Question) -> Simulated:
    depth = getattr(shape, "num_hidden_layers", 0)
    pattern = None if _adapters_differ_by_layer(question.lora) else _pattern(base_on_meta(shape, question))
    if pattern is None or depth <= 3 * pattern:
        return _simulated(shape, question, None)
    shallow, deep = _simulated(shape, question, pattern), _simulated(shape, question, 2 * pattern)
    return deep.beyond(shallow, (depth - 2 * pattern) / pattern)


def _adapters_differ_by_layer(lora: Lora) -> bool:
    """Whether the adapter differs between layers."""
    names = [*lora.rank_pattern, *(lora.target_modules if isinstance(lora.target_modules, list) else [])]
    return lora.layers_to_transform is not None or any(char.isdigit() for name in names for char in name)


def _pattern(base: PreTrainedModel) -> int | None:
    """Return the length of the repeating pattern of layer kinds; None without a pattern."""
    layers = layers_of(base.get_decoder())
    named = getattr(base.config, "layer_types", None) or [""] * len(layers)
    if len(named) != len(layers):
        return None
    kinds = [
        (name, *((key, p.shape) for key, p in layer.named_parameters()))
        for name, layer in zip(named, layers, strict=True)
    ]
    for length in range(1, LONGEST_PATTERN + 1):
        if all(kind == kinds[index % length] for index, kind in enumerate(kinds)):
            return length
    return None


def _simulated(shape: PretrainedConfig, question: Question, layers: int | None) -> Simulated:
    model = _on_meta(shape, question, layers)
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    trained = trainable(model)
    sizes = {
        "weights": _base_bytes(model),
        "quantized": sum(module.weight.numel() for module in quantized),
        "largest_layer": max(map(_base_bytes, layers_of(base_of(model).get_decoder())), default=0),
        "trained": sum(parameter.nbytes for parameter in trained),
        "trained_count": sum(parameter.numel() for parameter in trained),
    }
    kept, peak = _step(model, question)
    return Simulated(**sizes, kept=kept, peak=peak)


def _base_bytes(model: nn.Module) -> int:
    kinds = {id(module.weight): module.kind for module in model.modules() if isinstance(module, QuantizedLinear)}
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return sum(
        quantized_bytes(parameter, kinds[key]) if key in kinds else parameter.nbytes
        for key, parameter in frozen.items()
    )


def quantized_bytes(weight: Tensor, kind: str) -> int:
    """Return the size of a quantized weight, in bytes.

    nf4 takes half a byte per element, 1 byte per block of 64 elements, and 4 bytes per 256 blocks; int8 takes 1 byte
    per element and 4 bytes per row.
    """
    count = weight.numel()
    if kind == "int8":
        return count + 4 * weight.shape[0]
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256)


def _on_meta(shape: PretrainedConfig, question: Question, layers: int | None = None) -> PeftModel:
    """Build the model with its adapter on the meta device, optionally with only `layers` layers."""
    base = base_on_meta(shape, question, layers)
    with torch.device("meta"):
        if question.quantization != "none":
            _quantize(base, question.quantization)
        return get_peft_model(
            base, peft_config(question.lora, base), autocast_adapter_dtype=question.mixed, low_cpu_mem_usage=True
        )


def base_on_meta(shape: PretrainedConfig, question: Question, layers: int | None = None) -> PreTrainedModel:
    """Build the unmodified base model on the meta device.

    Raises:
        NotSimulated: if the model class cannot be built on the meta device.
    """
    shape = copy.deepcopy(shape)
    if layers is not None:
        shape.num_hidden_layers = layers
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[:layers]
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                shape, dtype=getattr(torch, question.dtype), trust_remote_code=question.own_code
            )
    except Exception as e:  # the model's remote code can raise any exception
        raise NotSimulated.because(e) from e


def _step(model: PeftModel, question: Question) -> tuple[int, int]:
    """Return the bytes that the forward pass keeps, and the peak until the end of the backward pass."""
    lengths, device = question.lengths, question.device
    AttentionInterface.register(SIMULATED, _attention(lengths, device))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        use_fused_lora(model)
        loss = SummedLoss(model)
        loss.simulated_device = device
        base = base_of(model)
        base.set_attn_implementation(SIMULATED)
        if question.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        model.train()
        preallocated = [*model.parameters(), *model.buffers()]
        for parameter in trainable(model):
            parameter.grad = torch.zeros_like(parameter)
            preallocated.append(parameter.grad)
        batch = _batch(lengths, question.learned)
        with _Counting(preallocated) as counting:
            with autocast(question.precision, torch.device("cpu")):
                total = loss(batch)
            kept = counting.now
            total.backward()
        return kept, counting.peak


def _batch(lengths: list[int], learned: int) -> Batch:
    ids, indices = torch.zeros(1, sum(lengths), dtype=torch.long), torch.zeros(learned, dtype=torch.long)
    boundaries = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    return Batch(ids, torch.zeros_like(ids), boundaries, max(lengths), indices, indices, sum(lengths))


class _Counting(TorchDispatchMode):
    """Counts the bytes of all live storages, except those of the `preallocated` tensors."""

    def __init__(self, preallocated: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in preallocated}

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
            weakref.finalize(storage, self._released, storage._cdata)

    def _released(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


# ---- replacements for kernels that fake tensors do not support


def _attention(lengths: list[int], device: str) -> Callable[..., tuple[Tensor, None]]:
    """Return an attention function with the memory of `varlen_attention`, for boundaries known in advance."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        if device == "cuda":
            return _Flash.apply(query, key, value).transpose(1, 2), None
        return attention_by_example(query, key, value, lengths), None

    return attention


class _Flash(torch.autograd.Function):
    """Allocates what FlashAttention keeps: the output, and one float32 per token and head (logsumexp)."""

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


def _quantize(base: nn.Module, kind: str) -> None:
    """Replace the layers that bitsandbytes would quantize by layers with the same memory use."""
    output = base.get_output_embeddings()  # type: ignore[operator]
    for module in [*base.modules()]:
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not output:
                quantized = QuantizedLinear(
                    child.in_features, child.out_features, child.bias is not None, dtype=child.weight.dtype
                )
                quantized.kind = kind
                quantized.requires_grad_(False)
                setattr(module, name, quantized)


class QuantizedLinear(nn.Linear):
    """A linear layer that dequantizes its weight in every pass."""

    kind = "nf4"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Dequantized.apply(x, self.weight, self.kind)
        return out if self.bias is None else out + self.bias


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(weight)
        if kind == "int8":
            # The input is quantized to 8 bits; the product has 32 bits
            _ = x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.int32)
            return x.new_empty((*x.shape[:-1], weight.shape[0]))
        return x @ torch.empty_like(weight, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ torch.empty_like(weight, dtype=gradients[0].dtype), None, None
