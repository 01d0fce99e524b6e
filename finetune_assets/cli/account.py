"""The account of a run on the terminal: asset by asset, what was computed or reused, found and stored.

Dagster passes each event of a run to the loggers of its job, as the attribute `dagster_event` of a log record. This
handler prints the events that matter to a reader, instead of one prefixed line each.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import CHAMPIONS
from finetune_assets.cli.findings import findings
from finetune_assets.cli.terminal import out, shown_path, styled
from finetune_assets.progress.screen import is_terminal

EVENT = dg.DagsterEventType
NOT_NEEDED = "Skipped: "
"""Beginning of the log message of an asset that the experiment has no settings for."""
NOISE = ("[pipes] ", "Cache hit: ", "Skipping step ", "Check ", "Dependencies for step ")
"""Beginnings of log messages whose content the account prints in its own way, or that are Dagster's own."""


@dataclass
class Outcomes:
    """What became of the assets of a run.

    Attributes:
        computed: Assets that were computed.
        reused: Assets that the store had (cache hits).
        failed: The error of each asset that failed.
        error: The error of the run itself, for example of its configuration.
        interrupted: Whether a signal has ended the run.
    """

    computed: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    error: str = ""
    interrupted: bool = False

    @property
    def first_error(self) -> str:
        """The error to print last: that of the first asset that failed, or that of the run."""
        return next((f"{asset}: {error}" for asset, error in self.failed.items()), self.error)


class Account(logging.Handler):
    """Prints a run's events as they happen, and collects its outcomes.

    Log lines of an asset are printed too where no progress bars are drawn, so that a log file shows progress.

    Args:
        prints: Print the events; otherwise only collect the outcomes.
    """

    def __init__(self, prints: bool = True) -> None:
        super().__init__(logging.DEBUG)
        self.outcomes, self.prints = Outcomes(), prints
        self.prints_log = not is_terminal(2)
        self._began: dict[str, float] = {}
        self._checks: dict[str, str] = {}
        self._asset = ""

    def logger(self) -> dg.LoggerDefinition:
        """The definition of a logger for Dagster that has this handler alone."""

        def create(_context: dg.InitLoggerContext) -> logging.Logger:
            logger = logging.Logger("finetune run", logging.DEBUG)
            logger.addHandler(self)
            return logger

        return dg.LoggerDefinition(create, description="The account of `finetune run`.")

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; an error here never fails the run."""
        event = getattr(record, "dagster_event", None)
        try:
            if isinstance(event, dg.DagsterEvent):
                self._event(event)
            else:
                self._message(record)
        except Exception:
            self.handleError(record)

    def _event(self, event: dg.DagsterEvent) -> None:
        step = event.step_key or ""
        match event.event_type:
            case EVENT.STEP_START | EVENT.STEP_RESTARTED:
                self._began[step] = time.monotonic()
                self._head(step)
            case EVENT.ASSET_MATERIALIZATION:
                self._materialized(step, event.step_materialization_data.materialization)
            case EVENT.ASSET_CHECK_EVALUATION:
                self._checked(step, event.asset_check_evaluation_data)
            case EVENT.STEP_SKIPPED:
                self._print(styled(step, "bold"), "skipped: an asset that it needs was not materialized")
            case EVENT.STEP_FAILURE:
                self._failed(step, event)
            case EVENT.RUN_FAILURE:
                self.outcomes.error = self.outcomes.error or _run_error(event)
            case _:
                pass  # Dagster's own

    def _print(self, *texts: object) -> None:
        if self.prints:
            out.print(*texts)

    def _head(self, step: str) -> None:
        if step != self._asset:
            self._asset = step
            self._print(styled(step, "bold"))

    def _materialized(self, step: str, materialization: dg.AssetMaterialization) -> None:
        asset = materialization.asset_key.to_user_string()
        metadata = {name: entry.value for name, entry in materialization.metadata.items()}
        seconds = time.monotonic() - self._began.get(step, time.monotonic())
        if metadata.get("index") == "none":
            self._print("    not needed: the experiment retrieves nothing")
            return
        hit = metadata.get("cache_hit", False)
        (self.outcomes.reused if hit else self.outcomes.computed).append(asset)
        found = findings(asset, metadata)
        text = ("cache hit" if hit else "computed") + f" in {seconds:.1f} s"
        self._print(" ", styled("✓", "green"), text + (f": {found}" if found else ""))
        if "uri" in metadata:
            self._print(f"    {asset} stored at {shown_path(str(metadata['uri']))}")

    def _checked(self, step: str, check: Any) -> None:
        if check.passed:
            return
        if check.severity is dg.AssetCheckSeverity.WARN or not check.blocking:
            self._print(" ", styled("!", "yellow"), f"check {check.check_name}: {check.description}")
            return
        text = f"check {check.check_name} failed"
        self._print(" ", styled("✗", "red"), text)
        self._checks[step] = "; ".join(filter(None, (self._checks.get(step), f"{text}: {check.description}")))

    def _failed(self, step: str, event: dg.DagsterEvent) -> None:
        """Print nothing of the error yet: it is the last line of the run."""
        data = event.step_failure_data
        if data.error and data.error.cls_name == dg.DagsterExecutionInterruptedError.__name__:
            self.outcomes.interrupted = True
            return
        described = data.user_failure_data.description if data.user_failure_data else None
        error = self._checks.get(step) or described or (data.error and _last_error(data.error)) or "failed"
        self.outcomes.failed[step] = error
        self._print(" ", styled("✗", "red"), "failed")

    def _message(self, record: logging.LogRecord) -> None:
        meta = getattr(record, "dagster_meta", {})  # the message of the record begins with job, run and step
        text = str(meta.get("orig_message") or record.getMessage())
        if text.startswith(NOISE) or " stored at " in text:
            return
        if text.startswith(NOT_NEEDED):
            self._print(f"    not needed: {text.removeprefix(NOT_NEEDED)}")
            return
        if record.levelno >= logging.WARNING:
            self._print(" ", styled("!", "yellow"), text)
        elif record.levelno >= logging.INFO and self.prints_log and meta.get("step_key") != CHAMPIONS.asset:
            self._print(f"    {text}")  # a decision is not printed here, because it is the result of the asset


def _last_error(error: Any) -> str:
    """The message of an unexpected error, or of its cause."""
    while error.cause:
        error = error.cause
    return f"{error.message.strip()}\nThis error is unexpected; run again with --verbose for its traceback"


def _run_error(event: dg.DagsterEvent) -> str:
    data = event.job_failure_data
    error = data.error if data else None
    while error and error.cause:
        error = error.cause
    return error.message.strip() if error else event.message or "the run failed"
