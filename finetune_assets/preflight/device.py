"""What a training is planned for: the hardware that the settings name, or this machine's. No GPU is touched."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_assets.config.gpus import computes_in_bf16, memory_gib
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.config.validation import COMPUTED_AS_STORED
from finetune_assets.errors import UserError
from finetune_assets.training.telemetry import cpu_name, nvml
from finetune_assets.worker import gpus

GIB = 1 << 30
RESERVED = {"cpu": 0.95, "cuda": 0.9}
"""Share of the device's memory that is planned with; the rest goes to gaps between allocations, and to the driver."""
AMPERE = 8
"""Compute capability from which GPUs compute in bfloat16."""


@dataclass(frozen=True)
class Device:
    """What a training is planned for.

    Attributes:
        kind: `cpu` or `cuda`.
        bytes: Memory of one GPU, or of the machine.
        processes: That train together.
        bf16: Whether it computes in bfloat16.
        name: As its maker calls it.
        nodes: Machines that they are on.
    """

    kind: str
    bytes: int
    processes: int
    bf16: bool
    name: str
    nodes: int = 1

    @property
    def usable(self) -> int:
        """Bytes that one process may plan with."""
        sharing = self.processes // self.nodes if self.kind == "cpu" else 1
        return int(self.bytes * RESERVED[self.kind]) // sharing

    def precision(self, experiment: ExperimentConfig) -> str:
        """As `compute_precision` decides there."""
        wanted = experiment.training.precision
        return wanted if wanted != "auto" else "bf16" if self.bf16 else "fp32"

    def dtype(self, experiment: ExperimentConfig) -> str:
        """As `weights_dtype` decides there, by its name in torch."""
        name: str = experiment.model.dtype
        if name == "auto":
            name = COMPUTED_AS_STORED.get(experiment.training.precision) or ("bfloat16" if self.bf16 else "float32")
        return name


def device_of(experiment: ExperimentConfig) -> Device:
    """What the settings name, or machines like this one; of a range of machines, as many as may begin.

    Raises:
        UserError: if this machine has not as many GPUs as are asked for, or does not tell what they are; or if they are
            a cluster's.
    """
    one = _one_machine(experiment)
    nodes = experiment.launcher.node_range[0]
    return replace(one, processes=one.processes * nodes, nodes=nodes)


def _one_machine(experiment: ExperimentConfig) -> Device:
    hardware, processes, asked = experiment.hardware, experiment.training.processes_per_node, experiment.launcher
    if hardware.memory_gib or hardware.gpu:
        name = hardware.gpu or "GPU"
        size = hardware.memory_gib or memory_gib(name) or 0  # an unknown name is refused when settings are loaded
        count = (asked.gpus_per_node or hardware.count) if processes == "auto" else int(processes)
        return Device("cuda", int(size * GIB), count, computes_in_bf16(name), name)
    if visible := gpus.visible():
        return _first_of(visible, gpus.wanted(processes, visible))
    if asked.gpus_per_node:
        raise UserError(
            f"launcher.gpus_per_node: {asked.gpus_per_node}, and this machine has none to plan for; say what the "
            "cluster's are in hardware.gpu or hardware.memory_gib"
        )
    count = 1 if processes == "auto" else int(processes)
    return Device("cpu", machine_bytes(), count, False, cpu_name())


def _first_of(visible: list[str], count: int) -> Device:
    """Ask the driver, not CUDA, which would take half a GiB of the GPU for as long as this process lives."""
    driver = nvml()
    if driver is None:
        raise UserError("this machine's GPUs do not tell their memory (NVML); set hardware.gpu or hardware.memory_gib")
    try:
        first = visible[0]
        by = driver.nvmlDeviceGetHandleByIndex if first.isdecimal() else driver.nvmlDeviceGetHandleByUUID
        handle = by(int(first) if first.isdecimal() else first)
        size = driver.nvmlDeviceGetMemoryInfo(handle).total
        bf16 = driver.nvmlDeviceGetCudaComputeCapability(handle)[0] >= AMPERE
        return Device("cuda", size, count, bf16, driver.nvmlDeviceGetName(handle))
    finally:
        driver.nvmlShutdown()


def machine_bytes() -> int:
    """Memory of this machine, or of the container that this process may fill.

    All of it, not what is free: a plan is for when the training has the machine.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdecimal() else whole
