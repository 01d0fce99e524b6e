"""Weights & Biases client of rank 0: sends messages to a separate process, and never blocks on an unreachable server.

This module does not import wandb; `wandb_process.py` imports it and connects to the server.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.config.validation import WANDB_MOST_CHARACTERS
from finetune_assets.errors import UserError
from finetune_assets.training.wandb_process import Message, answers

BINS = 64
TAG_CHARACTERS = 64
"""Maximum length of a tag in W&B; names of sweep points may be longer."""
BEGIN_SECONDS, STAGE_SECONDS = 60.0, 300.0
"""Timeouts while training waits for wandb: to load and start a run, and to copy an adapter."""
FINISH_SECONDS, FAILED_SECONDS = 600.0, 2.0
"""Timeouts for the end of the run, after a successful and after a failed training."""
PROBE_SECONDS, MISSES = 0.5, 3
"""Timeout of a server probe at the end of the run, and number of consecutive failures after a success."""


@dataclass(frozen=True)
class Used:
    """Input artifact of a run.

    Attributes:
        name: Name of the artifact in W&B.
        metadata: Fingerprint and other metadata of the artifact.
        uri: URI of the artifact in the store, if known.
    """

    name: str
    metadata: dict[str, Any]
    uri: str | None


@dataclass(frozen=True)
class Begin:
    """Start parameters of a run: arguments of `wandb.init`, tracking settings, and input artifacts."""

    project: str
    entity: str | None
    name: str
    id: str
    mode: str
    config: dict[str, Any]
    tags: list[str]
    log_model: bool
    watch: str
    logging_steps: int
    dataset: Used
    base_model: Used
    pid: int


def beginning(config: ExperimentConfig, made_from: dict[str, Any], uris: dict[str, str]) -> Begin | None:
    """Build the start parameters of a training's run; None if W&B is disabled.

    Args:
        config: The resolved settings.
        made_from: Fingerprints of the inputs; the run id is the prefix of `fingerprint`.
        uris: Known store URIs of the inputs, by name.
    """
    settings = config.wandb
    if settings is None:
        return None
    dataset, base = (made_from.get(name) or "unknown" for name in ("tokenized_dataset", "cached_base_model"))
    names = {name: made_from.get(name) for name in ("base_model", "revision")}
    return Begin(
        project=settings.project,
        entity=settings.entity,
        name=settings.run_name or made_from["experiment"][:WANDB_MOST_CHARACTERS],
        id=made_from["fingerprint"][:32],
        mode=settings.mode,
        config=asdict(config),
        tags=[made_from["experiment"][:TAG_CHARACTERS]],
        log_model=settings.log_model,
        watch=settings.watch,
        logging_steps=config.training.logging_steps,
        dataset=Used(
            f"dataset-{dataset[:32]}",
            {"fingerprint": dataset, "dolly_raw": made_from.get("dolly_raw")},
            uris.get("dataset"),
        ),
        base_model=Used(f"base-model-{base[:32]}", {"fingerprint": base, **names}, uris.get("base-model")),
        pid=os.getpid(),
    )


class WandbRun:
    """A run of Weights & Biases. No method raises W&B errors, and only `finish` waits for the server.

    dagster-wandb's IO manager is not usable here: it waits for an upload, which never happens offline.

    Args:
        begin: Start parameters of the run.
        write_line: Receives each line of text.
    """

    def __init__(self, begin: Begin, write_line: Callable[[str], None]) -> None:
        self._begin, self._write_line = begin, write_line
        self._histograms: dict[str, tuple[list[float], list[float]]] = {}
        self._received: Message = {}
        self._messages: SimpleQueue[Message] = SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "finetune_assets.training.wandb_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # survives signals to the training, to write its folder
        )
        threading.Thread(target=self._read_messages, daemon=True).start()
        self._send(begin=asdict(begin))

    # ---- during training

    def watch(self, step: int, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Compute histograms of the current weights and gradients, if enabled and if a report is due.

        Args:
            step: Number of the current optimizer step, from 1.
            parameters: Names and trained weights, with their gradients.
        """
        if self._begin.watch == "off" or (step > 1 and step % self._begin.logging_steps):
            return
        for name, parameter in parameters:
            if self._begin.watch != "gradients":
                self._histograms[f"parameters/{name}"] = histogram(parameter.detach())
            if self._begin.watch != "parameters" and parameter.grad is not None:
                self._histograms[f"gradients/{name}"] = histogram(parameter.grad)

    def record(self, numbers: dict[str, Any]) -> None:
        """Log the metrics of a step, with the step number as `step`, and the current histograms."""
        self._send(record={"numbers": numbers, "histograms": self._histograms})
        self._histograms = {}
        self._handle_pending()

    # ---- at the end

    def link(self) -> dict[str, str]:
        """Location of the run: `url` if online, `folder`, and the command `sync`; empty if W&B failed to start."""
        self._wait("begun", BEGIN_SECONDS)
        return {name: value for name, value in self._received.get("begun", {}).items() if name != "server"}

    def summarize(self, numbers: dict[str, Any]) -> None:
        self._send(summary={"numbers": numbers})

    def log_adapter(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Log the adapter as an artifact, if enabled; the folder may be deleted afterwards."""
        if self._begin.log_model:
            self._send(adapter={"folder": str(folder), "metadata": metadata})
            self._wait("staged", STAGE_SECONDS)

    def finish(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Finish the run, as failed after an error; wait for pending uploads while the server is reachable."""
        preempted = bool(error_type and issubclass(error_type, UserError) and error_type.retriable)
        self._send(finish={"exit_code": int(error_type is not None), "preempted": preempted})
        until = time.monotonic() + (FAILED_SECONDS if error_type else FINISH_SECONDS)
        misses = MISSES - 1
        while not self._wait("done", PROBE_SECONDS / 2):
            server = self._received.get("begun", {}).get("server")
            misses = 0 if server is None or answers(server, PROBE_SECONDS) else misses + 1
            if misses == MISSES or time.monotonic() > until:
                return self._report_unreachable(server)

    def _report_unreachable(self, server: str | None) -> None:
        sync = self._received.get("begun", {}).get("sync", "see docs/wandb.md")
        self._write_line(
            f"Weights & Biases: {server or 'wandb'} unreachable; the run is saved locally, upload it with: {sync}"
        )

    # ---- the other process

    def _send(self, **message: Any) -> None:
        try:
            assert self._process.stdin
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:  # the process has exited, and has reported the reason
            pass

    def _read_messages(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._messages.put(json.loads(line))
        self._messages.put({"done": True, "begun": {}, "staged": True})

    def _wait(self, key: str, seconds: float) -> bool:
        """Handle messages until `key` is received; False on timeout."""
        until = time.monotonic() + seconds
        while key not in self._received:
            try:
                self._handle(self._messages.get(timeout=max(0.0, until - time.monotonic())))
            except Empty:
                return False
        return True

    def _handle_pending(self) -> None:
        while not self._messages.empty():
            self._handle(self._messages.get())

    def _handle(self, message: Message) -> None:
        self._received = {**message, **self._received}
        if "line" in message:
            self._write_line(message["line"])
        if begun := message.get("begun"):
            why = f"{begun['why']}; " if "why" in begun else ""
            later = f"recorded in {begun['folder']}; upload it with: {begun['sync']}"
            self._write_line(f"Weights & Biases: {why}{begun.get('url') or later}")


def histogram(values: Tensor) -> tuple[list[float], list[float]]:
    """Compute the counts and bin edges of a histogram of the finite values."""
    flat = values.float().flatten()
    flat = flat[flat.isfinite()]
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return torch.histc(flat, BINS, low, high).tolist(), torch.linspace(low, high, BINS + 1).tolist()
