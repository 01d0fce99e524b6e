"""What a training costs: tokens, floating point operations, memory, and what the GPUs do meanwhile."""

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

if TYPE_CHECKING:  # planning asks for rates and names, without torch
    import torch
    from torch import nn

CONVENTION = (
    "4N floating point operations a token, N being the base's weights that are multiplied (with the output layer, "
    "without the input embedding): 2N forward and 2N for the gradient of the activations, as the base is frozen. "
    "Attention, the adapter and what gradient checkpointing computes again are not counted. Peak of the device: {peak}."
)
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "B200": 2250, "A100": 312, "A10G": 70, "A10": 125, "L40S": 362,
    "L4": 121, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip
"""Dense 16-bit matrix rates by the vendors' data sheets, in 10^12 operations a second, by a part of the name."""
SAMPLE_SECONDS = 1.0


def multiplied_weights(model: "nn.Module") -> int:
    """Weights of a frozen model that a token is multiplied with; of quantized layers, as many as they stand for."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found[id(module.weight)] = module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            found[id(module.weight)] = module.weight.numel()
    return sum(found.values())


def peak_flops(device: "torch.device", precision: str) -> tuple[float, str]:
    """The device's dense matrix rate in operations a second, and where it is known from."""
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
    """As its maker calls it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """This machine's CPU as its maker calls it, with its number of cores, on which its speed depends."""
    named = re.search(r"^model name\s*: (.+)$", _cpu_info(), re.MULTILINE)
    return f"{named[1].strip() if named else platform.machine()}, {os.cpu_count()} cores"


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def peak_memory_mib(device: "torch.device") -> int:
    """Of this process: of its GPU where it has one, else resident memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) >> 20
    return round(peak_resident_mib())


class Utilisation:
    """What NVIDIA's management library says of this node's GPUs, once a second, as rows of a table.

    Without a GPU or without `nvidia-ml-py` there are no rows.
    """

    COLUMNS = ("seconds", "step", "gpu", "utilisation_percent", "memory_mib", "power_watts", "temperature_celsius")

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.step = 0

    @contextmanager
    def sampling(self, device: "torch.device") -> Iterator[None]:
        """Sample in a thread of its own until the block is left."""
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
                self.rows.append((round(time.monotonic() - began, 1), self.step, gpu, *self._ask(driver, handle)))

    def _ask(self, driver: Any, handle: Any) -> list[Any]:
        """What a GPU tells; None for what it does not."""
        answers: list[Any] = []
        for question in (
            lambda: driver.nvmlDeviceGetUtilizationRates(handle).gpu,
            lambda: driver.nvmlDeviceGetMemoryInfo(handle).used >> 20,
            lambda: driver.nvmlDeviceGetPowerUsage(handle) / 1000,
            lambda: driver.nvmlDeviceGetTemperature(handle, driver.NVML_TEMPERATURE_GPU),
        ):
            try:
                answers.append(question())
            except driver.NVMLError:
                answers.append(None)
        return answers

    def write(self, path: Path) -> None:
        """Write the rows as CSV, if there are any."""
        if self.rows:
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([self.COLUMNS, *self.rows])


def nvml() -> Any:
    """NVIDIA's management library, begun; None where there is none."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
