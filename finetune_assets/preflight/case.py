"""Model properties that a plan needs: memory of a micro-batch, and the number of weights each token is multiplied with.

Both are determined by the base model's config.json, the settings in `Question`, and the code and libraries of the
simulation (`simulation.py`, which imports torch, transformers and peft). Results are cached, so that planning again is
instant.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_assets.config.schema import ExperimentConfig, Lora
from finetune_assets.preflight.device import Device
from finetune_assets.sources.model_sizes import check_sizes
from finetune_assets.store.results import Results, code_and_libraries
from finetune_assets.worker.model_libraries import import_lean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PACKAGE = Path(__file__).parents[1]
TRAINING = ("attention", "batches", "lora", "lora_names", "loss", "model", "precision")
SIMULATED_CODE = (PACKAGE / "preflight" / "simulation.py", *(PACKAGE / "training" / f"{name}.py" for name in TRAINING))
LIBRARIES = ("torch", "transformers", "peft")


class NotSimulated(Exception):
    """Raised when a training step cannot run on fake tensors, for example if tokens are routed by their values."""

    @classmethod
    def because(cls, error: Exception) -> "NotSimulated":
        """Create the exception from another, with its type and message on one line."""
        return cls(" ".join(f"{type(error).__name__}: {error}".split())[:200])


@dataclass(frozen=True)
class Shape:
    """Configuration of a base model, loaded with transformers only if a simulation needs it.

    Attributes:
        content: Bytes of config.json, which identify the configuration.
        load: Loads the configuration.
        results: Cache of simulation results; None disables caching.
    """

    content: bytes
    load: Callable[[], "PretrainedConfig"]
    results: Results | None = None

    @staticmethod
    def of(config: "PretrainedConfig", results: Results | None = None) -> "Shape":
        """Create a shape from a loaded configuration."""
        return Shape(config.to_json_string().encode(), lambda: config, results)

    @staticmethod
    def read(folder: Path, own_code: bool, results: Results | None = None) -> "Shape":
        """Create a shape from a base model folder; the weights are not required.

        Results of a model with remote code are not cached, because they depend on that code too.

        Raises:
            OSError: if config.json does not exist.
        """

        check_sizes(folder)

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
    """Inputs of a simulation besides the base model's configuration. All fields are part of the cache key.

    Attributes:
        lora: Settings of the adapter.
        quantization: Quantization of the base model.
        own_code: Whether the base model may run remote code.
        mixed: Whether trained weights are kept in float32.
        precision: Compute precision.
        dtype: Dtype of the base weights, and compute dtype of quantized weights.
        device: `cpu` or `cuda`.
        lengths: Lengths of the examples of the micro-batch in tokens, concatenated without padding.
        learned: Number of learned tokens in the micro-batch.
        checkpointing: Whether gradient checkpointing is on.
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
    """Memory of a model and one micro-batch; sizes are in bytes unless noted.

    Attributes:
        weights: Frozen weights, with quantized ones as bitsandbytes stores them.
        quantized: Number of elements in quantized weights.
        largest_layer: Frozen weights of the largest layer.
        trained: Trained weights.
        trained_count: Number of elements in trained weights.
        kept: Activations that the forward pass keeps for the backward pass.
        peak: Peak memory besides weights, gradients and optimizer, including activations.
    """

    weights: float
    quantized: float
    largest_layer: float
    trained: float
    trained_count: float
    kept: float
    peak: float

    def beyond(self, shallower: "Simulated", by: float) -> "Simulated":
        """Extrapolate to more layers: add `by` times the difference to `shallower`."""
        deep, shallow = vars(self), vars(shallower)
        return Simulated(**{name: deep[name] + by * (deep[name] - shallow[name]) for name in deep})


@dataclass(frozen=True)
class Case:
    """A micro-batch of a model on a device.

    Attributes:
        shape: Configuration of the base model.
        experiment: Settings of the experiment.
        device: Device to train on; it is not accessed.
        lengths: Lengths of the examples of the micro-batch in tokens, concatenated without padding.
        learned: Number of learned tokens in the micro-batch.
        checkpointing: Whether gradient checkpointing is on.
    """

    shape: Shape
    experiment: ExperimentConfig
    device: Device
    lengths: list[int]
    learned: int
    checkpointing: bool

    @property
    def dtype(self) -> str:
        """Dtype of the base weights, and compute dtype of quantized weights."""
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
    """Simulate the memory of a micro-batch, or return the cached result.

    Raises:
        NotSimulated: if the model cannot be simulated.
    """
    names = {field.name for field in fields(Simulated)}
    return Simulated(
        **_cached_result(case.shape, "micro_batch", asdict(case.question), names, lambda: _micro_batch(case))
    )


def _micro_batch(case: Case) -> dict[str, Any]:
    return vars(import_lean("finetune_assets.preflight.simulation").simulated(case.shape.config, case.question))


def multiplied_weights(case: Case) -> int:
    """Return the number of base weights that each token is multiplied with.

    Raises:
        NotSimulated: if the model cannot be built on the meta device.
    """
    return int(_cached_result(case.shape, "multiplied_weights", {}, {"count"}, lambda: _weights(case))["count"])


def _weights(case: Case) -> dict[str, Any]:
    simulation = import_lean("finetune_assets.preflight.simulation")
    return {"count": simulation.multiplied_weights_of(case.shape.config, case.question)}


def lora_problem(case: Case) -> str | None:
    """Return the first name in the `lora` settings that selects nothing in the model; None if all do.

    Raises:
        NotSimulated: if the model cannot be built on the meta device.
    """
    lora = {"lora": asdict(case.experiment.lora)}
    problem: str | None = _cached_result(case.shape, "lora_names", lora, {"problem"}, lambda: _names(case))["problem"]
    return problem


def _names(case: Case) -> dict[str, Any]:
    simulation = import_lean("finetune_assets.preflight.simulation")
    return {"problem": simulation.lora_problem_of(case.shape.config, case.question)}


def stored_dtype(shape: Shape) -> str | None:
    """Return the dtype of the stored base weights, if its configuration has one."""
    name = _cached_result(shape, "stored_dtype", {}, {"dtype"}, lambda: _dtype(shape))["dtype"]
    return name


def _dtype(shape: Shape) -> dict[str, Any]:
    dtype = getattr(shape.config, "dtype", None)
    return {"dtype": str(dtype).removeprefix("torch.") if dtype else None}


def _cached_result(
    shape: Shape, kind: str, inputs: dict[str, Any], names: set[str], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return the cached result, or compute and cache it."""
    code = code_and_libraries(SIMULATED_CODE, LIBRARIES)
    key = {"kind": kind, "config": hashlib.sha256(shape.content).hexdigest(), **code, **inputs}
    result = shape.results.get(key, names) if shape.results else None
    if result is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # addressed to other libraries, not to the user
            result = compute()
        if shape.results:
            shape.results.put(key, result)
    return result
