"""Data types of a computation, and which of them `auto` selects on a device.

`auto` is bfloat16 on a GPU that supports it, and on a CPU that has instructions for it and was measured to multiply
faster with them. It is float32 on any other device. Nothing is measured on a device without the instructions.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, PretrainedConfig

from finetune_assets.config.schema import Model, Training
from finetune_assets.config.validation import COMPUTED_AS_STORED

INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""CPU capabilities, as PyTorch names them, with which a bfloat16 matrix product is not emulated."""
MIN_SPEEDUP = 1.2
"""Minimum ratio of the matrix rates in bfloat16 and float32. Below it, the conversions cost more than is gained."""
TOKENS, WIDEST = 512, 2048
"""Maximum shape of the measured products: rows, and width of the weight in either direction."""
OPERATIONS = 1_000_000_000
"""Approximate operations of a measured product: at 20 GFLOP/s, all of them take 0.6 s."""
ROUNDS = 3

Shape = tuple[int, int]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MatrixRates:
    """Measured matrix rates of this process.

    Attributes:
        bf16: In bfloat16, in GFLOP/s.
        fp32: In float32, in GFLOP/s.
    """

    bf16: float
    fp32: float


@dataclass(frozen=True)
class AutoTypes:
    """What `model.dtype: auto` and `training.precision: auto` select.

    Attributes:
        bf16: Whether they are bfloat16 weights and `bf16`; otherwise float32 and `fp32`.
        instructions: CPU instructions for which bfloat16 was considered; empty on other devices.
        bf16_gflops: Measured matrix rate in bfloat16; None if nothing was measured.
        fp32_gflops: Measured matrix rate in float32; None if nothing was measured.
    """

    bf16: bool
    instructions: str = ""
    bf16_gflops: float | None = None
    fp32_gflops: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """Describe the decision in one line; empty if nothing was measured."""
        if self.bf16_gflops is None or self.fp32_gflops is None:
            return ""
        selected = "bf16" if self.bf16 else "fp32"
        return (
            f"auto selects {selected}: this CPU has {self.instructions}, and a matrix product runs at "
            f"{self.bf16_gflops:,.0f} GFLOP/s in bf16, {self.fp32_gflops:,.0f} in fp32"
        )

    def warn_if_emulated(self, device: torch.device) -> None:
        """Log that a training that began in bfloat16 resumes on a CPU that emulates it."""
        if self.bf16 and device.type == "cpu" and not cpu_instructions():
            logger.warning("auto stays bf16, as in the checkpoint; this CPU emulates it, which is slow")

    @staticmethod
    def recorded(training: Training, active: dict[str, Any]) -> "AutoTypes":
        """Return what a training used, from `active` of its log; logs of earlier versions record only the types."""
        if record := active.get("auto_types"):
            return AutoTypes(**record)
        if training.precision == "auto":
            return AutoTypes(active["precision"] == "bf16")
        return AutoTypes(active["weights"] == "bfloat16")


def weights_dtype(model: Model, training: Training, bf16: bool) -> torch.dtype:
    """Data type of the base model's weights; `auto` follows a precision that computes in the weights' data type.

    Args:
        model: Model settings.
        training: Training settings.
        bf16: Whether `auto` is bfloat16.
    """
    name = model.dtype if model.dtype != "auto" else COMPUTED_AS_STORED.get(training.precision)
    if name:
        return getattr(torch, name)
    return torch.bfloat16 if bf16 else torch.float32


def compute_precision(training: Training, bf16: bool) -> str:
    """Resolve `training.precision`; `auto` is bf16 if `bf16` is true, else fp32."""
    if training.precision != "auto":
        return training.precision
    return "bf16" if bf16 else "fp32"


def auto_types(model: Model, training: Training, device: torch.device, shape: Callable[[], Shape]) -> AutoTypes:
    """Decide what `auto` selects on a device.

    Args:
        model: Model settings.
        training: Training settings.
        device: Device of the computation.
        shape: Returns the shape of the model's largest products, as `product_shape` does. It is called only if a
            setting is `auto` and the CPU has the instructions.
    """
    if device.type == "cuda":
        return AutoTypes(torch.cuda.is_bf16_supported())
    if device.type != "cpu" or not _has_auto(model, training) or not (instructions := cpu_instructions()):
        return AutoTypes(False)
    return _of_this_cpu(instructions, shape())


def _has_auto(model: Model, training: Training) -> bool:
    stored = model.dtype == "auto" and training.precision not in COMPUTED_AS_STORED
    return training.precision == "auto" or stored


def cpu_instructions() -> str:
    """Name of this CPU's fastest instructions for bfloat16; empty without any."""
    capabilities = torch.cpu.get_capabilities()
    return next((name for name in INSTRUCTIONS if capabilities.get(name)), "")


@cache
def _of_this_cpu(instructions: str, shape: Shape) -> AutoTypes:
    """Decide for a shape, once per process, so that all models of a comparison are computed alike."""
    types = decide(instructions, measure(*shape))
    logger.info("%s", types.describe())
    return types


def decide(instructions: str, rates: MatrixRates) -> AutoTypes:
    """Select bfloat16 if its measured rate confirms what the instructions promise."""
    faster = rates.bf16 >= MIN_SPEEDUP * rates.fp32
    return AutoTypes(faster, instructions, round(rates.bf16, 1), round(rates.fp32, 1))


def measure(width: int, inner: int) -> MatrixRates:
    """Measure the matrix rate of both types with products as in training: a layer's output, and its input's gradient.

    Takes well under a second. The types alternate, and the best of several rounds counts, so that other processes on
    the machine affect both alike. No random numbers are drawn.

    Args:
        width: Width of the model's hidden states.
        inner: Width of the model's widest layer.
    """
    width, inner = min(width, WIDEST), min(inner, WIDEST)
    tokens = max(32, min(TOKENS, OPERATIONS // (2 * width * inner)))
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    operands = {dtype: _operands(tokens, width, inner, dtype) for dtype in best}
    with torch.inference_mode():
        for round_number in range(1 + ROUNDS):
            for dtype, (hidden, weight, gradient) in operands.items():
                began = time.perf_counter()
                F.linear(hidden, weight)
                torch.mm(gradient, weight)
                seconds = time.perf_counter() - began
                if round_number:  # the first round selects the kernels
                    best[dtype] = min(best[dtype], seconds)
    gflop = 2 * 2 * tokens * width * inner / 1e9
    return MatrixRates(gflop / best[torch.bfloat16], gflop / best[torch.float32])


def _operands(tokens: int, width: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes = ((tokens, width), (inner, width), (tokens, inner))
    return tuple(torch.full(shape, 0.5, dtype=dtype) for shape in shapes)


def product_shape(config: PretrainedConfig) -> Shape:
    """Widths of a model's hidden states and of its feed-forward layers."""
    text = config.get_text_config()
    width = int(text.hidden_size)
    return width, int(getattr(text, "intermediate_size", None) or 4 * width)


def product_shape_of(folder: Path, own_code: bool = False) -> Shape:
    """Widths of the model in a folder; typical ones if its configuration cannot be read.

    Args:
        folder: Folder of the base model.
        own_code: Run the Python code in the folder, because the experiment trusts this version.
    """
    try:
        return product_shape(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=own_code))
    except Exception:  # damaged folders raise many types; loading the model reports the problem
        return 1024, 4096
