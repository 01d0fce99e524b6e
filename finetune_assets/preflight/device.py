"""Hardware that a training run is planned for: from the settings, or of this machine. No GPU memory is allocated."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_assets.config.gpus import computes_in_bf16, memory_gib
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.config.validation import COMPUTED_AS_STORED
from finetune_assets.errors import UserError
from finetune_assets.training.telemetry import cpu_computes_in_bf16, cpu_name, nvml
from finetune_assets.worker import gpus

GIB = 1 << 30
RESERVED = {"cpu": 0.95, "cuda": 0.9}
"""Fraction of device memory that a plan may use; the rest is for fragmentation and the driver."""
AMPERE = 8
"""Minimum major compute capability for bfloat16."""


@dataclass(frozen=True)
class Device:
    """Hardware that a training run is planned for.

    Attributes:
        kind: `cpu` or `cuda`.
        bytes: Memory of one GPU, or of the machine for `cpu`.
        processes: Total number of training processes.
        bf16: Whether the device supports bfloat16.
        name: Product name.
        nodes: Number of machines.
    """

    kind: str
    bytes: int
    processes: int
    bf16: bool
    name: str
    nodes: int = 1

    @property
    def usable(self) -> int:
        """Usable memory of one process, in bytes."""
        sharing = self.processes // self.nodes if self.kind == "cpu" else 1
        return int(self.bytes * RESERVED[self.kind]) // sharing

    def precision(self, experiment: ExperimentConfig) -> str:
        """Return the precision that `compute_precision` selects on this device."""
        wanted = experiment.training.precision
        return wanted if wanted != "auto" else "bf16" if self.bf16 else "fp32"

    def dtype(self, experiment: ExperimentConfig) -> str:
        """Return the torch dtype name that `weights_dtype` selects on this device."""
        name: str = experiment.model.dtype
        if name == "auto":
            name = COMPUTED_AS_STORED.get(experiment.training.precision) or ("bfloat16" if self.bf16 else "float32")
        return name


def device_of(experiment: ExperimentConfig) -> Device:
    """Return the hardware in the settings, or machines like this one; for a range of nodes, the minimum.

    Raises:
        UserError: if this machine has fewer GPUs than required, does not report their memory, or the GPUs belong to a
            cluster and are not described in the settings.
    """
    machine = _one_machine(experiment)
    nodes = experiment.launcher.node_range[0]
    return replace(machine, processes=machine.processes * nodes, nodes=nodes)


def _one_machine(experiment: ExperimentConfig) -> Device:
    hardware, processes, launcher = experiment.hardware, experiment.training.processes_per_node, experiment.launcher
    if hardware.memory_gib or hardware.gpu:
        name = hardware.gpu or "GPU"
        size = hardware.memory_gib or memory_gib(name) or 0  # loading the settings rejects unknown names
        count = (launcher.gpus_per_node or hardware.count) if processes == "auto" else int(processes)
        return Device("cuda", int(size * GIB), count, computes_in_bf16(name), name)
    if visible := gpus.visible():
        return _query_first_gpu(visible, gpus.wanted(processes, visible))
    if launcher.gpus_per_node:
        raise UserError(
            f"launcher.gpus_per_node: {launcher.gpus_per_node}, but this machine has no GPU to plan for; set the GPUs "
            "of the cluster in hardware.gpu or hardware.memory_gib"
        )
    count = 1 if processes == "auto" else int(processes)
    return Device("cpu", machine_bytes(), count, cpu_computes_in_bf16(), cpu_name())


def _query_first_gpu(visible: list[str], count: int) -> Device:
    """Query the first GPU with NVML: a CUDA context would take 0.5 GiB of GPU memory until this process exits."""
    driver = nvml()
    if driver is None:
        raise UserError(
            "GPU memory of this machine is unknown (NVML is unavailable); set hardware.gpu or hardware.memory_gib"
        )
    try:
        first = visible[0]
        get_handle = driver.nvmlDeviceGetHandleByIndex if first.isdecimal() else driver.nvmlDeviceGetHandleByUUID
        handle = get_handle(int(first) if first.isdecimal() else first)
        size = driver.nvmlDeviceGetMemoryInfo(handle).total
        bf16 = driver.nvmlDeviceGetCudaComputeCapability(handle)[0] >= AMPERE
        return Device("cuda", size, count, bf16, driver.nvmlDeviceGetName(handle))
    finally:
        driver.nvmlShutdown()


def machine_bytes() -> int:
    """Return the total memory of this machine, or the limit of the container, in bytes.

    Total rather than free memory, because a plan assumes that the training has the machine to itself.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total
