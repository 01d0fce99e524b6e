"""Resource usage of a training: floating-point operations, memory, and GPU utilization."""

import csv
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.training.process_memory import peak_resident_mib

if TYPE_CHECKING:  # planning uses rates and names without torch
    import torch
    from torch import nn

CONVENTION = (
    "4N floating-point operations per token, where N is the number of base model weights in matrix multiplications "
    "(with the output layer, without the input embedding): 2N in the forward pass and 2N for the gradient of the "
    "activations, as the base model is frozen. Attention, the adapter and recomputation by gradient checkpointing are "
    "not counted. Device peak: {peak}."
)
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "B200": 2250, "A100": 312, "A10G": 70, "A10": 125, "L40S": 362,
    "L4": 121, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip
"""Dense 16-bit matrix rates from the vendors' data sheets, in TFLOP/s, by a substring of the device name."""
SAMPLE_SECONDS = 1.0


def multiplied_weights(model: "nn.Module") -> int:
    """Count the weights of a frozen model that take part in matrix multiplications; quantized weights count in full."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    sizes: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            sizes[id(module.weight)] = module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            sizes[id(module.weight)] = module.weight.numel()
    return sum(sizes.values())


def peak_flops(device: "torch.device", precision: str) -> tuple[float, str]:
    """Return the device's dense matrix rate in FLOP/s, and a description of its source."""
    import torch

    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for part, rate in PEAK_TFLOPS.items():
            if part in name:
                return rate * 1e12, f"{rate} TFLOP/s ({part}, data sheet)"
    dtypes = {"bf16": torch.bfloat16, "full_bf16": torch.bfloat16, "fp16": torch.float16, "full_fp16": torch.float16}
    measured = _measured_flops(device, dtypes.get(precision, torch.float32))
    return measured, f"{measured / 1e12:.3g} TFLOP/s (measured here, matrices of 1,024)"


def _measured_flops(device: "torch.device", dtype: "torch.dtype", size: int = 1024, seconds: float = 0.2) -> float:
    import torch

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    until = time.monotonic() + seconds
    while time.monotonic() < until or not best:
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def hardware_name(device: "torch.device") -> str:
    """Name of the device, as given by its manufacturer."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """Name of this machine's CPU, as given by its manufacturer, and its number of cores, which determines its speed."""
    match = re.search(r"^model name\s*: (.+)$", _cpu_info(), re.MULTILINE)
    return f"{match[1].strip() if match else platform.machine()}, {os.cpu_count()} cores"


def cpu_computes_in_bf16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16, by the kernel's list.

    Training asks PyTorch, and confirms it by a measurement (`precision.auto_types`); planning does not import PyTorch.
    """
    return bool(re.search(r"^flags\s*:.* (avx512_bf16|amx_bf16)\b", _cpu_info(), re.MULTILINE))


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def peak_memory_mib(device: "torch.device") -> int:
    """Return the peak memory of this process in MiB: GPU memory on CUDA, else RSS."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) >> 20
    return round(peak_resident_mib())


class Utilisation:
    """Samples the utilization of this node's GPUs through NVML once per second.

    Without a GPU or without `nvidia-ml-py`, `rows` stays empty.
    """

    COLUMNS = ("seconds", "step", "gpu", "utilisation_percent", "memory_mib", "power_watts", "temperature_celsius")

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.step = 0

    @contextmanager
    def sampling(self, device: "torch.device") -> Iterator[None]:
        """Sample in a background thread until the block exits."""
        driver = nvml() if device.type == "cuda" else None
        if driver is None:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._sample, args=(driver, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            driver.nvmlShutdown()

    def _sample(self, driver: Any, ended: threading.Event) -> None:
        began = time.monotonic()
        handles = [driver.nvmlDeviceGetHandleByIndex(i) for i in range(driver.nvmlDeviceGetCount())]
        while not ended.wait(SAMPLE_SECONDS):
            for gpu, handle in enumerate(handles):
                self.rows.append((round(time.monotonic() - began, 1), self.step, gpu, *self._query(driver, handle)))

    def _query(self, driver: Any, handle: Any) -> list[Any]:
        """Query the metrics of a GPU; None for metrics that it does not support."""
        values: list[Any] = []
        for query in (
            lambda: driver.nvmlDeviceGetUtilizationRates(handle).gpu,
            lambda: driver.nvmlDeviceGetMemoryInfo(handle).used >> 20,
            lambda: driver.nvmlDeviceGetPowerUsage(handle) / 1000,
            lambda: driver.nvmlDeviceGetTemperature(handle, driver.NVML_TEMPERATURE_GPU),
        ):
            try:
                values.append(query())
            except driver.NVMLError:
                values.append(None)
        return values

    def write(self, path: Path) -> None:
        """Write the samples as CSV, if any."""
        if self.rows:
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([self.COLUMNS, *self.rows])


def nvml() -> Any:
    """Initialize NVML and return its module; None if NVML is not available."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
