"""What a plan asks of a model: the memory of a micro-batch, and the weights that a token is multiplied with.

Both follow from the base model's config.json, the settings in `Question`, and the code and libraries of a simulation
(`simulation.py`, which imports torch, transformers and peft). Results are kept, so that planning again is instant.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.config.schema import ExperimentConfig, Lora
from finetune_assets.preflight.device import Device
from finetune_assets.preflight.results import Results
from finetune_assets.worker.model_libraries import import_lean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PACKAGE = Path(__file__).parents[1]
SIMULATED_CODE = ("preflight/simulation.py", *(f"training/{name}.py" for name in ("batches", "lora", "loss", "model")))
LIBRARIES = ("torch", "transformers", "peft")


class NotSimulated(Exception):
    """A model whose step does not run on tensors without data: one that routes tokens by what they are, say."""

    @classmethod
    def because(cls, error: Exception) -> "NotSimulated":
        """In one line of an error's own words."""
        return cls(" ".join(f"{type(error).__name__}: {error}".split())[:200])


@dataclass(frozen=True)
class Shape:
    """A base model's configuration, which is read by transformers only when a simulation needs it.

    Attributes:
        content: What identifies it: the bytes of config.json.
        load: Reads it.
        results: Where results of its simulations are kept; None to keep none.
    """

    content: bytes
    load: Callable[[], "PretrainedConfig"]
    results: Results | None = None

    @staticmethod
    def of(config: "PretrainedConfig", results: Results | None = None) -> "Shape":
        """Of a configuration that is there already."""
        return Shape(config.to_json_string().encode(), lambda: config, results)

    @staticmethod
    def read(folder: Path, own_code: bool, results: Results | None = None) -> "Shape":
        """Of a base model's folder; its weights need not be there.

        Results of a model with code of its own are not kept: they follow from that code too.

        Raises:
            OSError: if there is no config.json.
        """

        def load() -> "PretrainedConfig":
            transformers = import_lean("transformers")
            config: PretrainedConfig = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=own_code
            )
            return config

        return Shape((folder / "config.json").read_bytes(), load, None if own_code else results)

    @cached_property
    def config(self) -> "PretrainedConfig":
        return self.load()


@dataclass(frozen=True)
class Question:
    """All that a simulation reads beside the base model's configuration. A new field here is in the key of its result.

    Attributes:
        lora: Settings of the adapter.
        quantization: Of the base.
        own_code: Whether the base may run code of its own.
        mixed: Whether trained weights are kept in float32.
        precision: What is computed in.
        dtype: Of the base's weights, and what quantized ones are computed in.
        device: `cpu` or `cuda`.
        lengths: Tokens of the micro-batch's examples, which lie end to end.
        learned: How many of all their tokens are learned.
        checkpointing: Whether activations are computed twice.
    """

    lora: Lora
    quantization: str
    own_code: bool
    mixed: bool
    precision: str
    dtype: str
    device: str
    lengths: list[int]
    learned: int
    checkpointing: bool


@dataclass(frozen=True)
class Simulated:
    """What a model and one micro-batch take, in bytes where nothing else is said.

    Attributes:
        weights: The frozen weights, as bitsandbytes keeps those that it quantizes.
        quantized: Numbers in quantized weights.
        largest_layer: The frozen weights of the largest layer.
        trained: Trained weights.
        trained_count: Numbers in them.
        kept: By the backward pass, of the forward pass: the activations.
        peak: The highest there is at once beside weights, gradients and optimizer, activations included.
    """

    weights: float
    quantized: float
    largest_layer: float
    trained: float
    trained_count: float
    kept: float
    peak: float

    def beyond(self, shallower: "Simulated", by: float) -> "Simulated":
        """With more layers: `by` times as many as it has more than `shallower`."""
        ours, theirs = vars(self), vars(shallower)
        return Simulated(**{name: ours[name] + by * (ours[name] - theirs[name]) for name in ours})


@dataclass(frozen=True)
class Case:
    """A micro-batch of a model on a device.

    Attributes:
        shape: The base model's configuration.
        experiment: The settings.
        device: Where it is to be trained; nothing is asked of it.
        lengths: Tokens of the micro-batch's examples, which lie end to end.
        learned: How many of all their tokens are learned.
        checkpointing: Whether activations are computed twice.
    """

    shape: Shape
    experiment: ExperimentConfig
    device: Device
    lengths: list[int]
    learned: int
    checkpointing: bool

    @property
    def dtype(self) -> str:
        """Of the base's weights, and what quantized ones are computed in."""
        return self.device.dtype(self.experiment)

    @property
    def question(self) -> Question:
        model, training = self.experiment.model, self.experiment.training
        return Question(
            self.experiment.lora,
            model.quantization,
            bool(model.trust_remote_code),
            not training.precision.startswith("full_"),
            self.device.precision(self.experiment),
            self.dtype,
            self.device.kind,
            self.lengths,
            self.learned,
            self.checkpointing,
        )


def simulate(case: Case) -> Simulated:
    """What a micro-batch takes.

    Raises:
        NotSimulated: if the model cannot be simulated.
    """
    names = {field.name for field in fields(Simulated)}
    return Simulated(**_answered(case.shape, "micro_batch", asdict(case.question), names, lambda: _micro_batch(case)))


def _micro_batch(case: Case) -> dict[str, Any]:
    return vars(import_lean("finetune_assets.preflight.simulation").simulated(case.shape.config, case.question))


def multiplied_weights(case: Case) -> int:
    """Weights of the base that a token is multiplied with.

    Raises:
        NotSimulated: if the model cannot be built as a shape alone.
    """
    return int(_answered(case.shape, "multiplied_weights", {}, {"count"}, lambda: _weights(case))["count"])


def _weights(case: Case) -> dict[str, Any]:
    simulation = import_lean("finetune_assets.preflight.simulation")
    return {"count": simulation.multiplied_weights_of(case.shape.config, case.question)}


def stored_dtype(shape: Shape) -> str | None:
    """The type of the weights in the base model's files, if its configuration names one."""
    name = _answered(shape, "stored_dtype", {}, {"dtype"}, lambda: _dtype(shape))["dtype"]
    return name


def _dtype(shape: Shape) -> dict[str, Any]:
    dtype = getattr(shape.config, "dtype", None)
    return {"dtype": str(dtype).removeprefix("torch.") if dtype else None}


def _answered(
    shape: Shape, kind: str, question: dict[str, Any], names: set[str], answer: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A result that is kept, or one that is made now and kept."""
    whole = {"kind": kind, "config": hashlib.sha256(shape.content).hexdigest(), **_made_by(), **question}
    result = shape.results.get(whole, names) if shape.results else None
    if result is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what one library says to another
            result = answer()
        if shape.results:
            shape.results.put(whole, result)
    return result


@cache
def _made_by() -> dict[str, Any]:
    """Code and libraries of a simulation."""
    code = hashlib.sha256(b"".join((PACKAGE / name).read_bytes() for name in SIMULATED_CODE)).hexdigest()
    return {"code": code, "libraries": {name: version(name) for name in LIBRARIES}}
