"""What a training counts and remembers."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune_assets.training.batches import Batch


@dataclass(frozen=True)
class Job:
    """The folders of one training.

    Attributes:
        base_model: Weights and tokenizer.
        dataset: A tokenized dataset.
        output: Where the adapter goes; empty.
        checkpoints: Where checkpoints go and are looked for.
        made_from: Fingerprints and names of the inputs, for the provenance.
        warm_start: An adapter to begin from.
    """

    base_model: Path
    dataset: Path
    output: Path
    checkpoints: Path
    made_from: dict[str, Any]
    warm_start: Path | None = None


@dataclass
class Log:
    """What training remembers about itself; `trainer_state.json` and every checkpoint hold it."""

    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    held_out_loss: dict[str, float | None] = field(default_factory=lambda: {"before": None, "after": None})
    trainable_parameters: int = 0
    peak_memory_mib: int = 0
    active: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """What one process computes of a step.

    Attributes:
        batches: Its micro-batches.
        idle: What is computed for nothing while other processes have more micro-batches, where all take part in each.
        learned: Learned tokens of the whole global batch, by which the loss is divided.
    """

    batches: list[Batch]
    idle: list[Batch]
    learned: int


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        loss: This process's part of the mean loss; a scalar.
        tokens: Tokens that this process read, padding not counted.
        grad_norm: Global gradient norm before clipping; a scalar.
        learning_rate: What the step was taken with.
    """

    loss: Tensor
    tokens: int
    grad_norm: Tensor
    learning_rate: float


@dataclass
class Window:
    """What is counted from one report to the next.

    Attributes:
        loss: Sum of this process's part of the steps' mean losses.
        tokens: Tokens that this process read.
        steps: Steps done.
        began: When, on the monotonic clock.
    """

    loss: Tensor
    tokens: int = 0
    steps: int = 0
    began: float = field(default_factory=time.monotonic)
