"""Weights & Biases, as rank 0 of a training sees it: a process that is told things, and is never waited for in vain.

Nothing here imports wandb or asks its server; `wandb_process.py` does both.
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
from finetune_assets.errors import UserError
from finetune_assets.training.wandb_process import Message, answers

BINS = 64
BEGIN_SECONDS, STAGE_SECONDS = 60.0, 300.0
"""How long wandb may take to load and begin, and to copy an adapter, where training has to wait for it."""
FINISH_SECONDS, FAILED_SECONDS = 600.0, 2.0
"""How long an end is waited for at most, of a training that succeeded and of one that did not."""
PROBE_SECONDS, MISSES = 0.5, 3
"""How long a server may take to answer at the end, and how often in a row it may miss that once it has answered."""


@dataclass(frozen=True)
class Used:
    """An artifact that a run was made from.

    Attributes:
        name: What W&B calls it.
        metadata: Its fingerprint, and more.
        uri: Where it lies, if that is known.
    """

    name: str
    metadata: dict[str, Any]
    uri: str | None


@dataclass(frozen=True)
class Begin:
    """What a run begins with: `wandb.init`'s arguments, what the settings ask for, and what it was made from."""

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
    """How the run of a training begins; None if the settings ask for none.

    Args:
        config: The resolved settings.
        made_from: The inputs' fingerprints; the run's id is the beginning of `fingerprint`.
        uris: Where the inputs lie in the store, by name, as far as that is known.
    """
    settings = config.wandb
    if settings is None:
        return None
    dataset, base = (made_from.get(name) or "unknown" for name in ("tokenized_dataset", "cached_base_model"))
    names = {name: made_from.get(name) for name in ("base_model", "revision")}
    return Begin(
        project=settings.project,
        entity=settings.entity,
        name=settings.run_name or made_from["experiment"],
        id=made_from["fingerprint"][:32],
        mode=settings.mode,
        config=asdict(config),
        tags=[made_from["experiment"]],
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
    """One run of Weights & Biases. No method raises for what W&B does, or waits for its server but `finish`.

    dagster-wandb's IO manager cannot be used here: it waits for an upload, which never comes offline.

    Args:
        begin: What it begins with.
        say: Takes a line of text.
    """

    def __init__(self, begin: Begin, say: Callable[[str], None]) -> None:
        self._begin, self._say = begin, say
        self._histograms: dict[str, tuple[list[float], list[float]]] = {}
        self._known: Message = {}
        self._told: SimpleQueue[Message] = SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "finetune_assets.training.wandb_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # what ends the training lets it write its folder
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self._send(begin=asdict(begin))

    # ---- during training

    def look(self, step: int, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take histograms of weights and gradients as they are now, if the settings ask for them and a report is due.

        Args:
            step: The optimizer step that is being taken, from 1.
            parameters: Trained weights by name, with their gradients.
        """
        if self._begin.watch == "off" or (step > 1 and step % self._begin.logging_steps):
            return
        for name, parameter in parameters:
            if self._begin.watch != "gradients":
                self._histograms[f"parameters/{name}"] = histogram(parameter.detach())
            if self._begin.watch != "parameters" and parameter.grad is not None:
                self._histograms[f"gradients/{name}"] = histogram(parameter.grad)

    def record(self, numbers: dict[str, Any]) -> None:
        """Record what is known after a step, the number of which is `step`."""
        self._send(record={"numbers": numbers, "histograms": self._histograms})
        self._histograms = {}
        self._hear()

    # ---- at the end

    def link(self) -> dict[str, str]:
        """Where the run is: `url` if online, its `folder`, the command `sync`; empty if W&B failed altogether."""
        self._wait("begun", BEGIN_SECONDS)
        return {name: value for name, value in self._known.get("begun", {}).items() if name != "server"}

    def summarize(self, numbers: dict[str, Any]) -> None:
        self._send(summary={"numbers": numbers})

    def log_adapter(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Log the adapter as an artifact, if the settings ask for it; the folder may go afterwards."""
        if self._begin.log_model:
            self._send(adapter={"folder": str(folder), "metadata": metadata})
            self._wait("staged", STAGE_SECONDS)

    def finish(self, error_type: type[BaseException] | None, *_: object) -> None:
        """End the run, as failed if it ends by an error; wait for what is still to be sent while the server answers."""
        preempted = bool(error_type and issubclass(error_type, UserError) and error_type.retriable)
        self._send(finish={"exit_code": int(error_type is not None), "preempted": preempted})
        until = time.monotonic() + (FAILED_SECONDS if error_type else FINISH_SECONDS)
        misses = MISSES - 1
        while not self._wait("done", PROBE_SECONDS / 2):
            server = self._known.get("begun", {}).get("server")
            misses = 0 if server is None or answers(server, PROBE_SECONDS) else misses + 1
            if misses == MISSES or time.monotonic() > until:
                return self._leave(server)

    def _leave(self, server: str | None) -> None:
        sync = self._known.get("begun", {}).get("sync", "see docs/wandb.md")
        self._say(
            f"Weights & Biases: {server or 'wandb'} unreachable; the run is saved locally, upload it with: {sync}"
        )

    # ---- the other process

    def _send(self, **message: Any) -> None:
        try:
            assert self._process.stdin
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has ended, and said why
            pass

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._told.put(json.loads(line))
        self._told.put({"done": True, "begun": {}, "staged": True})

    def _wait(self, what: str, seconds: float) -> bool:
        """Hear what is told until something is known; whether it is."""
        until = time.monotonic() + seconds
        while what not in self._known:
            try:
                self._heard(self._told.get(timeout=max(0.0, until - time.monotonic())))
            except Empty:
                return False
        return True

    def _hear(self) -> None:
        while not self._told.empty():
            self._heard(self._told.get())

    def _heard(self, message: Message) -> None:
        self._known = {**message, **self._known}
        if "say" in message:
            self._say(message["say"])
        if begun := message.get("begun"):
            why = f"{begun['why']}; " if "why" in begun else ""
            later = f"recorded in {begun['folder']}, to be sent by: {begun['sync']}"
            self._say(f"Weights & Biases: {why}{begun.get('url') or later}")


def histogram(values: Tensor) -> tuple[list[float], list[float]]:
    """Counts and edges of what is finite of some values."""
    flat = values.float().flatten()
    flat = flat[flat.isfinite()]
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return torch.histc(flat, BINS, low, high).tolist(), torch.linspace(low, high, BINS + 1).tolist()
