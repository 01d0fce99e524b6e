"""How training tells people what it does: in the terminal, in the Dagster run, in Weights & Biases."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from finetune_assets.progress import STEPS, Progress
from finetune_assets.training.distributed import Process
from finetune_assets.training.tracking import Begin, WandbRun


@dataclass(frozen=True)
class StepReport:
    """What is known after an optimizer step.

    Attributes:
        step: Optimizer steps done.
        total: Optimizer steps in all.
        loss: Mean cross-entropy of the learned tokens since the last report, in nats.
        grad_norm: Global gradient norm of the last step, before clipping.
        learning_rate: Of the last step.
        tokens_per_second: Tokens read since the last report, padding not counted, over all processes.
        mfu: Share of the devices' matrix rate that the model's 4N operations a token make up.
        peak_memory_mib: Highest so far of rank 0: of its GPU, or resident.
        eta_seconds: Until the last step, at this speed.
        held_out_loss: Mean cross-entropy over the validation split, where it was just measured.
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

    def line(self) -> str:
        held_out = "" if self.held_out_loss is None else f" · held-out loss {self.held_out_loss:.4f}"
        return (
            f"step {self.step}/{self.total} · loss {self.loss:.4f}{held_out} · grad_norm {self.grad_norm:.3f} · "
            f"lr {self.learning_rate:.2e} · {self.tokens_per_second:,.0f} tokens/s · MFU {self.mfu:.0%} · "
            f"{self.peak_memory_mib / 1024:.1f} GiB · ETA {timedelta(seconds=round(self.eta_seconds))}"
        )

    def short(self) -> str:
        """What a bar has room for."""
        held_out = "" if self.held_out_loss is None else f" · held-out {self.held_out_loss:.4f}"
        return f"loss {self.loss:.4f}{held_out} · {self.tokens_per_second:,.0f} tokens/s"

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class Reporter:
    """Rank 0's voice; the other processes have none.

    Args:
        say: Takes a line of text.
        wandb_run: Also gets numbers, histograms and adapter, if given.
    """

    def __init__(self, say: Callable[[str], None], wandb_run: WandbRun | None = None) -> None:
        self.say = say
        self.wandb_run = wandb_run
        self._bar = Progress("training", None, STEPS, logs=False)

    @contextmanager
    def training(self, done: int, total: int) -> Iterator[Progress]:
        """Show how many optimizer steps are done."""
        with Progress("training", total, STEPS, done, logs=False) as self._bar:
            yield self._bar

    def step(self, report: StepReport) -> None:
        self._bar.note = report.short()
        if report.step < report.total:
            self._bar.says(report.line())
        self.say(report.line())
        if self.wandb_run:
            self.wandb_run.record(report.to_dict())


@contextmanager
def reporter(process: Process, begin: Begin | None = None) -> Iterator[Reporter]:
    """Open what this process reports to: the Dagster run where one listens, the terminal otherwise.

    Args:
        process: This process.
        begin: How its run of Weights & Biases begins, if it has one.
    """
    if not process.reports:
        yield Reporter(lambda line: None)
        return
    with ExitStack() as stack:
        say = _dagster_log(stack) or (lambda line: print(line, flush=True))
        stack.enter_context(_log_told(say))
        wandb_run = WandbRun(begin, say) if begin else None
        if wandb_run:
            stack.push(wandb_run.finish)
        yield Reporter(say, wandb_run)


class _Voice(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())


@contextmanager
def _log_told(say: Callable[[str], None]) -> Iterator[None]:
    """Also tell what this project logs, such as how far a measurement is."""
    package, voice = logging.getLogger("finetune_assets"), _Voice(say)
    package.setLevel(logging.INFO)
    package.addHandler(voice)
    try:
        yield
    finally:
        package.removeHandler(voice)


def _dagster_log(stack: ExitStack) -> Callable[[str], None] | None:
    try:
        from dagster_pipes import PipesEnvVarParamsLoader, open_dagster_pipes

        from finetune_assets.worker.pipes_worker import message_writer
    except ImportError:
        return None
    if not PipesEnvVarParamsLoader().is_dagster_pipes_process():
        return None
    return stack.enter_context(open_dagster_pipes(message_writer=message_writer())).log.info
