"""Data classes with the inputs, state and counters of a training."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune_assets.training.batches import Batch


@dataclass(frozen=True)
class TrainingPaths:
    """Input and output folders of a training.

    Attributes:
        base_model: Folder with the weights and the tokenizer of the base model.
        dataset: Folder of the tokenized dataset.
        output: Empty folder for the adapter.
        checkpoints: Folder for checkpoints.
        made_from: Fingerprints and names of the inputs, for the provenance.
        warm_start: Folder of the adapter for a warm start.
        own_code: Run the base model's own Python code, because the experiment trusts its version.
        reference: Folder of the champion's adapter, if it is the reference of judged answers.
        reference_log_probs: Folder of the reference's log-probabilities from an earlier training, if there was one.
    """

    base_model: Path
    dataset: Path
    output: Path
    checkpoints: Path
    made_from: dict[str, Any]
    warm_start: Path | None = None
    own_code: bool = False
    reference: Path | None = None
    reference_log_probs: Path | None = None


@dataclass
class TrainerState:
    """Training log, stored in `trainer_state.json` and in every checkpoint.

    `best` has the fields of `BestStep`, if the training evaluates. `seconds` is the duration of the steps alone, and
    `evaluation_seconds` that of the evaluations between them. `held_out_preference` has the metrics of the judged
    answers of the validation split before and after training, if there are any.
    """

    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    held_out_loss: dict[str, float | None] = field(default_factory=lambda: {"before": None, "after": None})
    held_out_preference: dict[str, dict[str, float]] = field(default_factory=dict)
    trainable_parameters: int = 0
    peak_memory_mib: int = 0
    best: dict[str, Any] | None = None
    active: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class StepBatches:
    """Work of one process for a step.

    Attributes:
        batches: Micro-batches of this process.
        idle: Micro-batches with zero weight, computed while other processes have more micro-batches. Required with
            sharding, where every process takes part in each micro-batch.
        learned: Number of target tokens of the whole global batch, by which the loss is divided; judged answers
            excluded.
        judged: Number of judged answers (pairs, with `dpo`) of the whole global batch.
        mismatched: With `kto`, batches of this process for the divergence from the reference.
    """

    batches: list[Batch]
    idle: list[Batch]
    learned: int
    judged: int = 0
    mismatched: list[Batch] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """Result of an optimizer step.

    Attributes:
        loss: Contribution of this process to the mean loss; a scalar.
        tokens: Tokens processed by this process, padding excluded.
        grad_norm: Global gradient norm before clipping; a scalar.
        learning_rate: Learning rate of the step.
        judged: Sums of the rewards of this process's judged answers; see `JudgedLoss.sums`.
    """

    loss: Tensor
    tokens: int
    grad_norm: Tensor
    learning_rate: float
    judged: Tensor | None = None


@dataclass
class MetricWindow:
    """Counters since the last report.

    Attributes:
        loss: Sum over steps of the contribution of this process to the mean loss; a scalar.
        tokens: Tokens processed by this process.
        steps: Number of completed steps.
        judged: Sum of `Step.judged`.
        began: Start time on the monotonic clock, in seconds.
    """

    loss: Tensor
    tokens: int = 0
    steps: int = 0
    judged: Tensor | None = None
    began: float = field(default_factory=time.monotonic)
