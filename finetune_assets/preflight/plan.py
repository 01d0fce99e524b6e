"""A training before it begins: does it fit, how many steps and tokens, how long, for how much."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.preflight.advice import ways
from finetune_assets.preflight.case import Case, NotSimulated, Shape, multiplied_weights
from finetune_assets.preflight.device import GIB, Device, device_of
from finetune_assets.preflight.memory import MIB, Memory, predict
from finetune_assets.preflight.results import Results
from finetune_assets.preflight.speed import Kind, Past, speed
from finetune_assets.preflight.work import Work, full_batch, work_of


def sized(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


@dataclass(frozen=True)
class Plan:
    """What a training will take.

    Attributes:
        device: Where.
        memory: Of one process at its highest; None where the model cannot be simulated.
        unknown: Why not.
        checkpointing: Whether activations are to be computed twice.
        advice: Settings that would fit, where it does not.
        work: Steps and tokens; None while there is no tokenized dataset.
        hours: Of training; None where nothing says how fast the hardware is.
        known_from: Where the speed is known from.
        cost: Of all devices, in the currency of the price; None without one.
    """

    device: Device
    memory: Memory | None
    unknown: str
    checkpointing: bool
    advice: list[str]
    work: Work | None
    hours: float | None
    known_from: str
    cost: float | None

    @property
    def fits(self) -> bool:
        """False only where it is known not to."""
        return self.memory is None or self.memory.total <= self.device.usable

    def told(self) -> str:
        """One sentence: whether it fits, and what would."""
        if self.memory is None:
            return f"Memory estimate unavailable: the model cannot be simulated ({self.unknown})"
        each = "GPU" if self.device.kind == "cuda" else "process"
        needs = f"{sized(self.memory.total)} of the {sized(self.device.usable)} that a {each} can use"
        machines = f" on {self.device.nodes} machines" if self.device.nodes > 1 else ""
        where = f"{self.device.processes} x {self.device.name}{machines}"
        if self.fits:
            return f"Fits {where}: {needs}"
        return f"Does not fit {where}: {needs}. Settings that fit: {'; or '.join(self.advice)}"

    def to_dict(self) -> dict[str, Any]:
        work = self.work and {"steps": self.work.steps, "tokens": self.work.tokens}
        return {
            "device": {"name": self.device.name, "processes": self.device.processes},
            "memory_mib": self.memory.described() if self.memory else {},
            "peak_memory_mib": round(self.memory.total / MIB, 1) if self.memory else None,
            "usable_mib": round(self.device.usable / MIB, 1),
            "gradient_checkpointing": self.checkpointing,
            "fits": self.fits,
            "told": self.told(),
            "advice": self.advice,
            "work": work,
            "hours": self.hours,
            "known_from": self.known_from,
            "cost": self.cost,
        }


def read_shape(folder: Path, experiment: ExperimentConfig, results: Path | None = None) -> Shape:
    """The configuration of a base model's folder; its weights need not be there.

    Args:
        folder: The folder.
        experiment: The settings.
        results: Folder where results of simulations are kept, if they are to be: `NodeCache.simulations`.
    """
    kept = Results(results) if results else None
    return Shape.read(folder, bool(experiment.model.trust_remote_code), kept)


def make_plan(
    shape: Shape,
    experiment: ExperimentConfig,
    dataset: Path | None = None,
    states: Iterable[dict[str, Any]] = (),
) -> Plan:
    """Plan a training.

    Args:
        shape: The base model's configuration.
        experiment: The settings.
        dataset: Folder of the tokenized dataset, if there is one.
        states: Trainer states of earlier trainings, from which the hardware's speed is known.

    Raises:
        UserError: if the settings ask for GPUs that are not there.
    """
    device = device_of(experiment)
    work = work_of(dataset, experiment, device.processes) if dataset else None
    lengths, learned = (work.lengths, work.learned) if work else full_batch(experiment)
    case, memory, unknown = settled(Case(shape, experiment, device, lengths, learned, checkpointing=False))
    advice = ways(case, memory) if memory and memory.total > device.usable else []
    hours, known_from = _hours(case, work, states)
    price = experiment.hardware.price_per_hour
    cost = None if hours is None or price is None else hours * price * device.processes
    return Plan(device, memory, unknown, case.checkpointing, advice, work, hours, known_from, cost)


def settled(case: Case) -> tuple[Case, Memory | None, str]:
    """Decide as the trainer does whether activations are computed twice, and what the training takes then."""
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


def _hours(case: Case, work: Work | None, states: Iterable[dict[str, Any]]) -> tuple[float | None, str]:
    if work is None:
        return None, "steps and tokens are known once tokenized_dataset is made"
    experiment, device = case.experiment, case.device
    try:
        weights = multiplied_weights(case)
    except NotSimulated as e:
        return None, f"the model cannot be built as a shape alone ({e})"
    kind = Kind(
        weights, experiment.model.quantization, device.precision(experiment), case.checkpointing, device.processes
    )
    past = [found for state in states if (found := Past.of(state))]
    rate, known_from = speed(device.name, kind, past)
    if rate is None:
        return None, known_from
    return 4 * weights * work.tokens / rate / device.processes / 3600, known_from
