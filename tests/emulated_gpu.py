"""A GPU that is not there: tensors that are on `cuda` for Python, and compute on the CPU.

`device="cuda"` gives an `EmulatedTensor`: its `device` is `cuda:0` and `is_cuda` is true, so code takes its branches
for CUDA, and each operator that reaches PyTorch's dispatcher is recorded, then computed on a CPU tensor inside. As on a
GPU, an operator that is given tensors of both devices is an error. PyTorch's own fake tensors hold no values, and a
build without CUDA has no backward pass for them; here whole trainings run.

What has no implementation on a CPU is computed by a reference: the variable-length FlashAttention, whose requirements
are checked as the kernel does.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import varlen as _registers_operators  # noqa: F401
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME, MEMORY = "NVIDIA H100 80GB HBM3", 80 << 30
HOST_ONLY = {"aten::_to_copy", "aten::copy_"}
"""Operators that take tensors of both devices."""

calls: Counter[str] = Counter()
"""Operators computed on the emulated GPU since `emulated_gpu` was entered, such as `aten::mm`."""
pinned: list[Tensor] = []
"""Host tensors that were pinned."""


class EmulatedTensor(Tensor):
    """A tensor on the emulated GPU; `host` has its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "EmulatedTensor":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CPU,
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return 0

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return to_host(self)

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self) -> Any:
        return self.host.tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"EmulatedTensor({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        name = func._schema.name
        _check_devices(name, args, kwargs)
        calls[name] += 1
        on_host = tree_map_only(EmulatedTensor, lambda tensor: tensor.host, (args, kwargs))
        out = REFERENCES.get(name, func)(*on_host[0], **on_host[1])
        out = tree_map_only(Tensor, cls, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


def _on_cpu(value: Any) -> Any:
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def _check_devices(name: str, args: Any, kwargs: Any) -> None:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    host = [tensor for tensor in tensors if not isinstance(tensor, EmulatedTensor) and tensor.dim() > 0]
    if host and name not in HOST_ONLY:
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} takes tensors of cuda:0 and cpu")


class _Crossing(torch.autograd.Function):
    """Copies between the devices; the gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.host.clone() if isinstance(tensor, EmulatedTensor) else EmulatedTensor(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].host if isinstance(gradients[0], EmulatedTensor) else EmulatedTensor(gradients[0])


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU."""
    if not isinstance(tensor, EmulatedTensor):
        return tensor
    moved: Tensor = _Crossing.apply(tensor)
    return moved


def to_gpu(tensor: Tensor) -> Tensor:
    """Copy a tensor to the emulated GPU."""
    if isinstance(tensor, EmulatedTensor):
        return tensor
    moved: Tensor = _Crossing.apply(tensor)
    return moved


class _Placing(TorchFunctionMode):
    """Creates and moves tensors by their `device` argument."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            pinned.append(args[0])
            return args[0]
        if func is Tensor.cuda:
            return to_gpu(args[0])
        if func is Tensor.to:
            return _moved(func, args, kwargs)
        if func is Tensor.data.__set__ and isinstance(args[0], EmulatedTensor):  # type: ignore[attr-defined]
            args[0].host = args[1].host
        device = kwargs.get("device")
        if device is None or not _is_cuda(device):
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": CPU})
        return made if isinstance(made, EmulatedTensor) else _placed(made)


def _placed(made: Tensor) -> Tensor:
    tensor = EmulatedTensor(made.detach())
    return tensor.requires_grad_(made.requires_grad)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int | str | torch.device) and torch.device(device).type == "cuda"


def _moved(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`Tensor.to`, whose device is an argument, a keyword or that of another tensor."""
    tensor, *others = args
    target = kwargs.pop("device", None)
    rest = []
    for other in others:
        if isinstance(other, Tensor):
            target = other.device
            kwargs["dtype"] = other.dtype
        elif isinstance(other, str | torch.device) or (isinstance(other, int) and not isinstance(other, bool)):
            target = torch.device(other)
        elif other is not None:
            rest.append(other)
    kwargs.pop("non_blocking", None)
    if target is not None:
        kind = torch.device(target).type
        tensor = {"cuda": to_gpu, "cpu": to_host}.get(kind, lambda each: func(each, target))(tensor)
    rest = [value for value in rest if not isinstance(value, bool)]
    return func(tensor, *rest, **kwargs) if rest or kwargs else tensor


# ---- operators without an implementation on a CPU


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window: list[int] | None = None,
    enable_gqa: bool = False,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `torch_attn::_varlen_attn`, with the kernel's requirements."""
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype in (torch.float16, torch.bfloat16), f"FlashAttention requires 16 bits, found {query.dtype}"
    assert query.dim() == key.dim() == value.dim() == 3, "tokens, heads, width"
    assert key.shape == value.shape
    assert query.shape[2] == key.shape[2] <= 256
    assert query.shape[2] % 8 == 0
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0)
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert torch.equal(ends_q, ends_k)
    assert ends_q[0] == 0
    assert ends_q[-1] == len(query) == len(key)
    assert longest_q == longest_k == int(ends_q.diff().max())
    outputs = [
        torch.einsum("hqk,khd->qhd", shares, v)
        for shares, _, _, v in _by_example(query, key, value, ends_q, is_causal, scale, window)
    ]
    logsumexp = query.new_zeros(query.shape[1], len(query), dtype=torch.float32)
    return torch.cat(outputs).to(query.dtype), logsumexp, torch.zeros(2, dtype=torch.uint64)


def _by_example(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    is_causal: bool,
    scale: float | None,
    window: list[int] | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Attention weights, queries, keys and values of each example, in float32, with as many key as query heads."""
    lengths, groups = ends.diff().tolist(), query.shape[1] // key.shape[1]
    left, right = window or (-1, -1)
    right = 0 if is_causal else right
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        q, k, v = q.float(), k.float().repeat_interleave(groups, 1), v.float().repeat_interleave(groups, 1)
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None, :]
        seen = (distance <= (left if left >= 0 else len(q))) & (-distance <= (right if right >= 0 else len(q)))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        yield scores.masked_fill(~seen, -torch.inf).softmax(-1), q, k, v


def _flash_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    is_causal: bool,
    random_state: Tensor,
    scale: float | None = None,
    window: list[int] | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `torch_attn::_varlen_attn_backward`."""
    assert gradient.shape == out.shape == query.shape
    assert gradient.dtype == query.dtype
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    upstream = iter(gradient.float().split(ends_q.diff().tolist()))
    for shares, q, k, v in _by_example(query, key, value, ends_q, is_causal, scale, window):
        of_out = next(upstream)
        of_shares = torch.einsum("qhd,khd->hqk", of_out, v)
        of_scores = shares * (of_shares - (shares * of_shares).sum(-1, keepdim=True)) * (scale or q.shape[-1] ** -0.5)
        of_pair = torch.einsum("hqk,qhd->khd", of_scores, q), torch.einsum("hqk,qhd->khd", shares, of_out)
        groups = [each.unflatten(1, (key.shape[1], -1)).sum(2) for each in of_pair]
        parts.append((torch.einsum("hqk,khd->qhd", of_scores, k), *groups))
    of_query, of_key, of_value = (torch.cat(each).to(query.dtype) for each in zip(*parts, strict=True))
    return of_query, of_key, of_value


REFERENCES: dict[str, Callable[..., Any]] = {
    "torch_attn::_varlen_attn": _flash_attention,
    "torch_attn::_varlen_attn_backward": _flash_attention_backward,
}

# ---- the device itself


class _Autocast(torch.autocast):
    """Autocast of `cuda` that also casts what computes on the CPU."""

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **more: Any) -> None:
        super().__init__(device_type, dtype, enabled, **more)
        self.beneath = torch.amp.autocast_mode.autocast("cpu", dtype, enabled) if device_type == "cuda" else None

    def __enter__(self) -> Any:
        if self.beneath:
            self.beneath.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        super().__exit__(*error)
        if self.beneath:
            self.beneath.__exit__(*error)


_submit_elsewhere = ThreadPoolExecutor.submit


def _submit(executor: ThreadPoolExecutor, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Emulate the GPU in other threads too: a function mode is one thread's."""

    def with_gpu() -> Any:
        with _Placing():
            return function(*args, **kwargs)

    return _submit_elsewhere(executor, with_gpu)


@contextmanager
def emulated_gpu(allocated: int = 3 << 30, free: int = MEMORY) -> Iterator[Counter[str]]:
    """Emulate one GPU until the block exits.

    Args:
        allocated: Peak allocated memory that `torch.cuda` reports, in bytes.
        free: Free memory that it reports.

    Yields:
        Number of calls of each operator.
    """
    facts: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda *_: None,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "max_memory_allocated": lambda *_: allocated,
        "memory_allocated": lambda *_: allocated,
        "memory_reserved": lambda *_: allocated,
        "mem_get_info": lambda *_: (free, MEMORY),
        "_lazy_init": lambda: None,
    }
    calls.clear()
    pinned.clear()
    with ExitStack() as stack:
        for name, answer in facts.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch("torch.autocast", _Autocast))
        # `Module.to` would otherwise set the data of a tensor of another kind
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", _submit))
        stack.enter_context(_Placing())
        yield calls
