"""Progress reports of a training: to the terminal, the Dagster run, and experiment trackers."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from finetune_assets.display import PlainRecords
from finetune_assets.progress import STEPS, Progress
from finetune_assets.training.distributed import DistributedContext
from finetune_assets.training.trackers import TRACKERS, TrackedTraining, Tracker


@dataclass(frozen=True)
class StepReport:
    """Metrics after an optimizer step.

    Attributes:
        step: Number of completed optimizer steps.
        total: Total number of optimizer steps.
        loss: Mean loss since the last report: cross-entropy in nats per target token, unless answers are judged.
        grad_norm: Global gradient norm of the last step, before clipping.
        learning_rate: Learning rate of the last step.
        tokens_per_second: Throughput since the last report over all processes, padding excluded.
        mfu: Model FLOPs utilization: fraction of the devices' peak matrix rate used by the model's 4N operations per
            token.
        peak_memory_mib: Peak memory of rank 0 in MiB: GPU memory, or RSS without a GPU.
        eta_seconds: Estimated time until the last step at the current throughput, in seconds.
        held_out_loss: Mean loss of the validation split, if it was just measured.
        reward_margin: Mean reward of chosen or good answers minus that of the others, since the last report.
        preference_accuracy: Fraction of judged answers on the right side, since the last report; see `JudgedLoss`.
    """

    step: int
    total: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    mfu: float
    peak_memory_mib: int
    eta_seconds: float
    held_out_loss: float | None = None
    reward_margin: float | None = None
    preference_accuracy: float | None = None

    def line(self) -> str:
        held_out = "" if self.held_out_loss is None else f" · held-out loss {self.held_out_loss:.4f}"
        if self.reward_margin is not None:
            held_out += f" · reward margin {self.reward_margin:.4f}"
        if self.preference_accuracy is not None:
            held_out += f" · preference accuracy {self.preference_accuracy:.0%}"
        return (
            f"step {self.step}/{self.total} · loss {self.loss:.4f}{held_out} · grad_norm {self.grad_norm:.3f} · "
            f"lr {self.learning_rate:.2e} · {self.tokens_per_second:,.0f} tokens/s · MFU {self.mfu:.0%} · "
            f"{self.peak_memory_mib / 1024:.1f} GiB · ETA {timedelta(seconds=round(self.eta_seconds))}"
        )

    def short(self) -> str:
        """Short form of the report for a progress bar."""
        held_out = "" if self.held_out_loss is None else f" · held-out {self.held_out_loss:.4f}"
        return f"loss {self.loss:.4f}{held_out} · {self.tokens_per_second:,.0f} tokens/s"

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class Reporter:
    """Reports the progress of a training; only the reporter of rank 0 has any output.

    Args:
        write_line: Receives each line of text.
        trackers: Experiment trackers that also receive metrics and the adapter, by name.
    """

    def __init__(self, write_line: Callable[[str], None], trackers: Mapping[str, Tracker] | None = None) -> None:
        self.write_line = write_line
        self.trackers = trackers or {}
        self._bar = Progress("training", None, STEPS, logs=False)

    @contextmanager
    def training(self, done: int, total: int) -> Iterator[Progress]:
        """Show a progress bar of the optimizer steps."""
        with Progress("training", total, STEPS, done, logs=False) as self._bar:
            yield self._bar

    def step(self, report: StepReport) -> None:
        self._bar.note = report.short()
        if report.step < report.total:
            self._bar.log_line(report.line())
        self.write_line(report.line())
        for tracker in self.trackers.values():
            tracker.record(report.to_dict())


@contextmanager
def reporter(process: DistributedContext, training: TrackedTraining | None = None) -> Iterator[Reporter]:
    """Open a reporter that writes to the Dagster run of a Pipes process, and to the terminal otherwise.

    Args:
        process: This process.
        training: The training, for its trackers; None where nothing is trained.
    """
    if not process.reports:
        yield Reporter(lambda line: None)
        return
    with ExitStack() as stack:
        write_line = _dagster_log(stack) or (lambda line: print(line, flush=True))
        stack.enter_context(_forward_log_records(write_line))
        trackers = {}
        for name, opened in TRACKERS.items() if training else ():
            if training and (tracker := opened(training, write_line)):
                trackers[name] = tracker
                stack.push(tracker.finish)
        yield Reporter(write_line, trackers)


class _LineHandler(logging.Handler):
    def __init__(self, write_line: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.addFilter(PlainRecords())
        self.write_line = write_line

    def emit(self, record: logging.LogRecord) -> None:
        self.write_line(record.getMessage())


@contextmanager
def _forward_log_records(write_line: Callable[[str], None]) -> Iterator[None]:
    """Also report this project's log records, such as the progress of an evaluation."""
    package, handler = logging.getLogger("finetune_assets"), _LineHandler(write_line)
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)


def _dagster_log(stack: ExitStack) -> Callable[[str], None] | None:
    try:
        from dagster_pipes import PipesEnvVarParamsLoader, open_dagster_pipes

        from finetune_assets.worker.pipes_worker import message_writer
    except ImportError:
        return None
    if not PipesEnvVarParamsLoader().is_dagster_pipes_process():
        return None
    return stack.enter_context(open_dagster_pipes(message_writer=message_writer())).log.info
