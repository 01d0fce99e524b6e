"""The registry of experiment trackers. A tracker of your own is a file in this folder and an entry in TRACKERS."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.training.tracking import WandbRun, beginning


@dataclass(frozen=True)
class TrackedTraining:
    """A training, for its trackers.

    Attributes:
        config: The resolved settings.
        made_from: Fingerprints of the inputs, and the adapter's own as `fingerprint`, which identifies the training
            also after it was resumed.
        uris: Known store URIs of the inputs, by name.
    """

    config: ExperimentConfig
    made_from: dict[str, Any]
    uris: dict[str, str]


class Tracker(Protocol):
    """Receives the metrics of a training, in rank 0. No method may raise, or wait long for a server."""

    def watch(self, step: int, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Called at each optimizer step, from 1, before the gradients are clipped, with the trained parameters."""

    def record(self, numbers: dict[str, Any]) -> None:
        """Log the metrics of a report, with the step number as `step`."""

    def summarize(self, numbers: dict[str, Any]) -> None:
        """Log the final metrics."""

    def log_adapter(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Log the adapter's files; the folder may be deleted afterwards."""

    def link(self) -> dict[str, str]:
        """Where the run is found, for the trainer state; empty if nowhere."""

    def finish(self, error_type: type[BaseException] | None, *_: object) -> None:
        """End the run, as failed if there was an error."""


WriteLine = Callable[[str], None]


def open_wandb(training: TrackedTraining, write_line: WriteLine) -> Tracker | None:
    """A run of Weights & Biases, if the experiment has the settings group `wandb`."""
    begin = beginning(training.config, training.made_from, training.uris)
    return WandbRun(begin, write_line) if begin else None


TRACKERS: dict[str, Callable[[TrackedTraining, WriteLine], Tracker | None]] = {
    "wandb": open_wandb,
}
"""How each tracker is opened; None if the experiment does not use it. Its link is stored under its name in the trainer
state."""
