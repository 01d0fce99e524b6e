"""Plan a training run: whether it fits in memory, its steps and tokens, duration and cost."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.errors import UserError
from finetune_assets.preflight.advice import ways
from finetune_assets.preflight.case import Case, NotSimulated, Shape, lora_problem, multiplied_weights
from finetune_assets.preflight.device import GIB, Device, device_of
from finetune_assets.preflight.memory import MIB, Memory, predict
from finetune_assets.preflight.speed import Kind, Past, speed
from finetune_assets.preflight.work import TrainingWork, full_batch, work_of
from finetune_assets.store.results import Results


def sized(size: float) -> str:
    """Format a size in bytes as GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


@dataclass(frozen=True)
class Plan:
    """Estimated requirements of a training run.

    Attributes:
        device: Hardware that the plan is for.
        memory: Peak memory of one process, by part; None if the model cannot be simulated.
        unknown: Why the model cannot be simulated; empty otherwise.
        checkpointing: Whether gradient checkpointing will be on.
        advice: Settings that fit, if the current ones do not.
        work: Steps and tokens; None without a tokenized dataset.
        hours: Training time in hours, evaluations included, if the training does not stop early; None if the speed of
            the hardware is unknown.
        known_from: Source of the speed estimate, or why it is unknown.
        cost: Cost of all devices, in the currency of `hardware.price_per_hour`; None without a price.
    """

    device: Device
    memory: Memory | None
    unknown: str
    checkpointing: bool
    advice: list[str]
    work: TrainingWork | None
    hours: float | None
    known_from: str
    cost: float | None

    @property
    def fits(self) -> bool:
        """Whether the training fits in memory; true if its memory is unknown."""
        return self.memory is None or self.memory.total <= self.device.usable

    def summary(self) -> str:
        """Return one sentence: whether the training fits, and otherwise the settings that do."""
        if self.memory is None:
            return f"Memory estimate unavailable: the model cannot be simulated ({self.unknown})"
        each = "GPU" if self.device.kind == "cuda" else "process"
        needs, usable = sized(self.memory.total), sized(self.device.usable)
        machines = f" on {self.device.nodes} machines" if self.device.nodes > 1 else ""
        where = f"{self.device.processes} x {self.device.name}{machines}"
        if self.fits:
            return f"Fits {where}: {needs} of the {usable} that a {each} can use"
        advice = "; or ".join(self.advice)
        return f"Does not fit {where}: it needs {needs}, and a {each} can use {usable}. Settings that fit: {advice}"

    def to_dict(self) -> dict[str, Any]:
        work = self.work and {"steps": self.work.steps, "tokens": self.work.tokens}
        evaluations = self.work and {
            "count": self.work.evaluations,
            "time_share": self.work.evaluation_share,
            "fewest_steps": self.work.fewest_steps,
        }
        return {
            "device": {"name": self.device.name, "processes": self.device.processes},
            "memory_mib": self.memory.described() if self.memory else {},
            "peak_memory_mib": round(self.memory.total / MIB, 1) if self.memory else None,
            "usable_mib": round(self.device.usable / MIB, 1),
            "gradient_checkpointing": self.checkpointing,
            "fits": self.fits,
            "summary": self.summary(),
            "advice": self.advice,
            "work": work,
            "evaluations": evaluations,
            "hours": self.hours,
            "known_from": self.known_from,
            "cost": self.cost,
        }


def read_shape(folder: Path, experiment: ExperimentConfig, results: Path | None = None) -> Shape:
    """Read the configuration of a base model; the weights are not required.

    Args:
        folder: Folder of the base model.
        experiment: Settings of the experiment.
        results: Folder of cached simulation results (`NodeCache.simulations`); None disables caching.
    """
    cached = Results(results) if results else None
    return Shape.read(folder, bool(experiment.model.trust_remote_code), cached)


def make_plan(
    shape: Shape,
    experiment: ExperimentConfig,
    dataset: Path | None = None,
    states: Iterable[dict[str, Any]] = (),
) -> Plan:
    """Plan a training run.

    Args:
        shape: Configuration of the base model.
        experiment: Settings of the experiment.
        dataset: Folder of the tokenized dataset; None if it is not materialized yet.
        states: Trainer states of earlier training runs, to estimate the speed of the hardware.

    Raises:
        UserError: if the settings require GPUs that are not available, or if a name in `lora` is not in the model.
    """
    device = device_of(experiment)
    work = work_of(dataset, experiment, device.processes) if dataset else None
    lengths, learned = (work.lengths, work.learned) if work else full_batch(experiment)
    case = Case(shape, experiment, device, lengths, learned, checkpointing=False)
    with suppress(NotSimulated):  # training checks it
        if problem := lora_problem(case):
            raise UserError(problem)
    case, memory, unknown = settled(case)
    advice = ways(case, memory) if memory and memory.total > device.usable else []
    hours, known_from = _hours(case, work, states)
    price = experiment.hardware.price_per_hour
    cost = None if hours is None or price is None else hours * price * device.processes
    return Plan(device, memory, unknown, case.checkpointing, advice, work, hours, known_from, cost)


def settled(case: Case) -> tuple[Case, Memory | None, str]:
    """Decide on gradient checkpointing as the trainer does, and predict the memory for this choice."""
    wanted = case.experiment.training.gradient_checkpointing
    case = replace(case, checkpointing=bool(wanted))
    try:
        memory = predict(case)
        if wanted is None and memory.total > case.device.usable:
            case = replace(case, checkpointing=True)
            memory = predict(case)
    except NotSimulated as e:
        return case, None, str(e)
    return case, memory, ""


def _hours(case: Case, work: TrainingWork | None, states: Iterable[dict[str, Any]]) -> tuple[float | None, str]:
    if work is None:
        return None, "steps and tokens are unknown until tokenized_dataset is materialized"
    experiment, device = case.experiment, case.device
    try:
        weights = multiplied_weights(case)
    except NotSimulated as e:
        return None, f"the model cannot be built on the meta device ({e})"
    kind = Kind(
        weights, experiment.model.quantization, device.precision(experiment), case.checkpointing, device.processes
    )
    past = [run for state in states if (run := Past.of(state))]
    rate, known_from = speed(device.name, kind, past)
    if rate is None:
        return None, known_from
    seconds = 4 * weights * work.tokens / rate / device.processes
    return seconds * (1 + work.evaluation_share + work.forward_share) / 3600, known_from
