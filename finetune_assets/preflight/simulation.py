"""One training step on tensors without data: what it keeps and how high it rises, whatever the architecture.

The trainer's own model, adapter and loss are run forward and backward on PyTorch's fake tensors, which have shapes and
types and no memory, and every storage that comes and goes is counted. A deep model is simulated at two depths: what a
layer adds is the same for each, or repeats after a few.
"""

import copy
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from finetune_assets.config.schema import Lora
from finetune_assets.preflight.case import NotSimulated, Question, Simulated
from finetune_assets.training.batches import Batch
from finetune_assets.training.lora import use_fused_lora
from finetune_assets.training.loss import SummedLoss
from finetune_assets.training.model import autocast, base_of, layers_of, peft_config, trainable
from finetune_assets.training.telemetry import multiplied_weights

SIMULATED = "simulated"
"""The name under which transformers knows the attention of a simulation."""
LONGEST_PATTERN = 8
"""Kinds of layers that may follow one another before they repeat; a model without such a pattern is simulated whole."""


def simulated(shape: PretrainedConfig, question: Question) -> Simulated:
    """Simulate a micro-batch of a model.

    Raises:
        NotSimulated: if the model cannot be.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it prints a traceback of what is told in a sentence
    try:
        return _at_depth(shape, question)
    except NotSimulated:
        raise
    except Exception as e:
        raise NotSimulated.because(e) from e
    finally:
        log.setLevel(level)


def multiplied_weights_of(shape: PretrainedConfig, question: Question) -> int:
    """Weights of a model that a token is multiplied with.

    Raises:
        NotSimulated: if its class cannot be built as a shape alone.
    """
    return multiplied_weights(base_on_meta(shape, question))


def _at_depth(shape: PretrainedConfig, question: Question) -> Simulated:
    depth = getattr(shape, "num_hidden_layers", 0)
    pattern = None if _names_layers(question.lora) else _pattern(base_on_meta(shape, question))
    if pattern is None or depth <= 3 * pattern:
        return _simulated(shape, question, None)
    shallow, deep = _simulated(shape, question, pattern), _simulated(shape, question, 2 * pattern)
    return deep.beyond(shallow, (depth - 2 * pattern) / pattern)


def _names_layers(lora: Lora) -> bool:
    """Whether layers get adapters that differ."""
    names = [*lora.rank_pattern, *(lora.target_modules if isinstance(lora.target_modules, list) else [])]
    return lora.layers_to_transform is not None or any(char.isdigit() for name in names for char in name)


def _pattern(base: PreTrainedModel) -> int | None:
    """After how many layers their kinds repeat; None if they do not."""
    layers = layers_of(base.get_decoder())
    named = getattr(base.config, "layer_types", None) or [""] * len(layers)
    if len(named) != len(layers):
        return None
    kinds = [
        (name, *((key, p.shape) for key, p in layer.named_parameters()))
        for name, layer in zip(named, layers, strict=True)
    ]
    for length in range(1, LONGEST_PATTERN + 1):
        if all(kind == kinds[at % length] for at, kind in enumerate(kinds)):
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
    """Of one weight: nf4 has half a byte an element, a byte for each block of 64, and 4 for each 256 of those; int8 a
    byte an element, and 4 a row."""
    count = weight.numel()
    if kind == "int8":
        return count + 4 * weight.shape[0]
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256)


def _on_meta(shape: PretrainedConfig, question: Question, layers: int | None = None) -> PeftModel:
    """The model with its adapter as shapes alone, of fewer layers where that is asked for."""
    base = base_on_meta(shape, question, layers)
    with torch.device("meta"):
        if question.quantization != "none":
            _quantize(base, question.quantization)
        return get_peft_model(
            base, peft_config(question.lora, base), autocast_adapter_dtype=question.mixed, low_cpu_mem_usage=True
        )


def base_on_meta(shape: PretrainedConfig, question: Question, layers: int | None = None) -> PreTrainedModel:
    """The base alone, as it was published.

    Raises:
        NotSimulated: if its class cannot be built as a shape alone.
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
    except Exception as e:  # a model's own code may fail in any way
        raise NotSimulated.because(e) from e


def _step(model: PeftModel, question: Question) -> tuple[int, int]:
    """Bytes that a forward pass keeps, and the most there is at once until the backward pass has ended."""
    lengths, device = question.lengths, question.device
    AttentionInterface.register(SIMULATED, _attention(lengths, device))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        use_fused_lora(model)
        loss = SummedLoss(model)
        loss.chunks_on = device
        base = base_of(model)
        base.set_attn_implementation(SIMULATED)
        if question.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        model.train()
        there = [*model.parameters(), *model.buffers()]
        for parameter in trainable(model):
            parameter.grad = torch.zeros_like(parameter)
            there.append(parameter.grad)
        batch = _batch(lengths, question.learned)
        with _Counting(there) as counting:
            with autocast(question.precision, torch.device("cpu")):
                total = loss(batch)
            kept = counting.now
            total.backward()
        return kept, counting.peak


def _batch(lengths: list[int], learned: int) -> Batch:
    ids, at = torch.zeros(1, sum(lengths), dtype=torch.long), torch.zeros(learned, dtype=torch.long)
    boundaries = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    return Batch(ids, torch.zeros_like(ids), boundaries, max(lengths), at, at, sum(lengths))


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


def _quantize(base: nn.Module, kind: str) -> None:
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
