"""A training before it begins: does it fit, how many steps and tokens, how long, for how much."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from finetune_assets.config.schema import ExperimentConfig, Hardware
from finetune_assets.preflight.memory import Device, Memory, predict
from finetune_assets.preflight.simulation import base_on_meta
from finetune_assets.training.batches import Examples, TrainOrder, read_packs
from finetune_assets.training.memory import free_bytes
from finetune_assets.training.telemetry import PEAK_TFLOPS, hardware_name, multiplied_weights

GIB = 1 << 30
WITHOUT_BF16 = ("V100", "T4", "P100", "RTX 20")
ASSUMED_MFU = 0.35
"""Of a GPU that nothing has been trained on yet."""


@dataclass(frozen=True)
class Past:
    """What an earlier training showed.

    Attributes:
        hardware: What it ran on.
        quantization: Of its base.
        precision: What it computed in.
        flops: Operations a second and process, 4 a weight and token.
    """

    hardware: str
    quantization: str
    precision: str
    flops: float

    @staticmethod
    def of(state: dict[str, Any]) -> "Past | None":
        """From a `trainer_state.json`; None from one that does not say enough."""
        active = state.get("active", {})
        weights, seconds = active.get("multiplied_weights"), state.get("seconds")
        if not weights or not seconds or not active.get("hardware"):
            return None
        rate = 4 * weights * state["tokens"] / seconds / active["processes"]
        return Past(active["hardware"], active["quantization"], active["precision"], rate)


@dataclass(frozen=True)
class Work:
    """What is to be done, exactly.

    Attributes:
        steps: Optimizer steps.
        tokens: That all processes read, padding not counted.
        lengths: Examples of the largest micro-batch.
        learned: Its learned tokens.
    """

    steps: int
    tokens: int
    lengths: list[int]
    learned: int


@dataclass(frozen=True)
class Plan:
    """What a training will take.

    Attributes:
        device: Where.
        memory: Of one process at its highest.
        checkpointing: Whether activations are to be computed twice.
        fits: Whether it does.
        advice: Settings that would fit, where it does not.
        work: Steps and tokens; None while there is no tokenized dataset.
        hours: None where nothing says how fast the hardware is.
        known_from: Where the speed is known from.
        cost: In the currency of the price; None without one.
    """

    device: Device
    memory: Memory
    checkpointing: bool
    fits: bool
    advice: list[str]
    work: Work | None
    hours: float | None
    known_from: str
    cost: float | None


def device_of(hardware: Hardware, processes: str) -> Device:
    """What the settings name, or this machine."""
    count = hardware.count if processes == "auto" else int(processes)
    if hardware.memory_gib or hardware.gpu:
        name = hardware.gpu or "GPU"
        size = hardware.memory_gib or _memory_of(name)
        return Device("cuda", int(size * GIB), count, not any(old in name for old in WITHOUT_BF16), name)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if here.type == "cuda":
        size, bf16 = torch.cuda.get_device_properties(here).total_memory, torch.cuda.is_bf16_supported()
        count = torch.cuda.device_count() if processes == "auto" else count
        return Device("cuda", size, count, bf16, hardware_name(here))
    return Device("cpu", free_bytes(here), count, False, hardware_name(here))


MEMORY_GIB = {"H200": 140, "H100": 79, "B200": 178, "A100": 79, "L40S": 44, "L4": 22, "A10": 22, "RTX 4090": 23.5,
              "RTX 3090": 23.5, "V100": 15.5, "T4": 14.5}  # fmt: skip
"""What `nvidia-smi` shows, rounded down, by a part of the name; of a kind with several sizes the usual one."""


def _memory_of(name: str) -> float:
    return next((size for part, size in MEMORY_GIB.items() if part in name), 0)


def work_of(dataset: Path, experiment: ExperimentConfig, processes: int) -> Work:
    """Steps and tokens of a tokenized dataset, to the last one."""
    train, packs = Examples.read(dataset / "train.arrow"), read_packs(dataset)
    sequences = packs or [[example] for example in range(len(train))]
    lengths = np.array([train.lengths[sequence].sum() for sequence in sequences])
    training, tokens = experiment.training, experiment.data.tokenization
    longest = (tokens.packing_length if packs else None) or tokens.cutoff_len
    budget = training.micro_batch_size * longest
    order = TrainOrder(lengths, training, training.group_by_length and not packs, processes, budget)
    read, largest = 0, (0, [0])
    for step in range(order.steps):
        read += int(lengths[order.global_batch(step)].sum())
        for rank in range(processes):
            for batch in order.micro_batches(step, rank):
                largest = max(largest, (int(lengths[batch].sum()), batch))
    members = [example for sequence in largest[1] for example in sequences[sequence]]
    return Work(order.steps, read, train.lengths[members].tolist(), int(train.learned[members].sum()))


def full_batch(experiment: ExperimentConfig) -> tuple[list[int], int]:
    """Lengths and learned tokens of the largest micro-batch that the settings allow."""
    tokens = experiment.data.tokenization
    length = (tokens.packing_length if tokens.packing else None) or tokens.cutoff_len
    lengths = [length] * experiment.training.micro_batch_size
    return lengths, sum(lengths)


def make_plan(
    shape: PretrainedConfig,
    experiment: ExperimentConfig,
    dataset: Path | None = None,
    past: Sequence[Past] = (),
) -> Plan:
    """Plan a training.

    Args:
        shape: The base model's configuration.
        experiment: The settings.
        dataset: Folder of the tokenized dataset, if there is one.
        past: Earlier trainings, from which the hardware's speed is known.
    """
    device = device_of(experiment.hardware, experiment.training.processes_per_node)
    work = work_of(dataset, experiment, device.processes) if dataset else None
    lengths, learned = (work.lengths, work.learned) if work else full_batch(experiment)
    wanted = experiment.training.gradient_checkpointing
    memory = predict(shape, experiment, device, lengths, learned, bool(wanted))
    checkpointing = bool(wanted)
    if wanted is None and memory.total > device.usable:
        memory, checkpointing = predict(shape, experiment, device, lengths, learned, True), True
    fits = memory.total <= device.usable
    advice = [] if fits else _ways(shape, experiment, device, lengths, learned, memory, checkpointing)
    hours, known_from = _hours(shape, experiment, device, work, past)
    price = experiment.hardware.price_per_hour
    cost = hours * price * device.processes if hours is not None and price is not None else None
    return Plan(device, memory, checkpointing, fits, advice, work, hours, known_from, cost)


def _ways(
    shape: PretrainedConfig,
    experiment: ExperimentConfig,
    device: Device,
    lengths: list[int],
    learned: int,
    memory: Memory,
    checkpointing: bool,
) -> list[str]:
    """Changes after which it fits, the smallest first; what all of them together do not save is told too."""
    training, found = experiment.training, []

    def with_micro(size: int, now: Memory) -> Memory:
        share = size / training.micro_batch_size
        return replace(now, **{part: int(getattr(now, part) * share) for part in ("activations", "workspace", "gaps")})

    def smaller(now: Memory) -> str | None:
        for size in range(training.micro_batch_size - 1, 0, -1):
            if with_micro(size, now).total <= device.usable:
                return f"training.micro_batch_size={size}"
        return None

    if way := smaller(memory):
        found.append(way)
    changes: list[str] = []
    now, settings = memory, experiment
    if not checkpointing:
        changes.append("training.gradient_checkpointing=true")
        now = predict(shape, settings, device, lengths, learned, True)
        found += _fitting(changes, now, device, smaller)
    if experiment.model.quantization != "nf4":
        changes.append("model.quantization=nf4")
        settings = replace(settings, model=replace(settings.model, quantization="nf4"))
        now = predict(shape, settings, device, lengths, learned, True)
        found += _fitting(changes, now, device, smaller)
    if device.kind == "cuda" and training.sharding == "none" and not found:
        least = with_micro(1, now)
        over = least.total - least.weights
        if over < device.usable:
            needs = -(-least.weights // max(1, device.usable - over))
            changes += [f"training.sharding=fsdp on at least {needs} GPUs", "training.micro_batch_size=1"]
            found.append(", ".join(changes))
    return found or ["a smaller base model, or a shorter data.tokenization.cutoff_len"]


def _fitting(changes: list[str], now: Memory, device: Device, smaller: Any) -> list[str]:
    if now.total <= device.usable:
        return [", ".join(changes)]
    way = smaller(now)
    return [", ".join([*changes, way])] if way else []


def _hours(
    shape: PretrainedConfig, experiment: ExperimentConfig, device: Device, work: Work | None, past: Sequence[Past]
) -> tuple[float | None, str]:
    if work is None:
        return None, "steps and tokens are known once tokenized_dataset is made"
    here = [one for one in past if device.name in one.hardware or one.hardware in device.name]
    alike = [one for one in here if one.quantization == experiment.model.quantization]
    alike = [one for one in alike if one.precision == device.precision(experiment)] or alike or here
    if alike:
        rate, known_from = median(one.flops for one in alike), f"{len(alike)} earlier trainings on {device.name}"
    else:
        part = next((part for part in PEAK_TFLOPS if part in device.name), None)
        if part is None:
            return None, f"nothing was trained on {device.name} yet"
        rate = PEAK_TFLOPS[part] * 1e12 * ASSUMED_MFU
        known_from = f"{ASSUMED_MFU:.0%} of the data sheet's rate, as nothing was trained on {device.name} yet"
    weights = multiplied_weights(base_on_meta(shape, experiment, torch.bfloat16))
    return 4 * weights * work.tokens / rate / device.processes / 3600, known_from
