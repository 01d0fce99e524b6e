"""Training checkpoints, from which an interrupted training resumes.

The data order and the dropout of a step are functions of seed and step, so a checkpoint contains only the adapter, that
of the best step so far, the optimizer, the learning rate schedule and the step.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from finetune_assets.training.distributed import DistributedContext

WEIGHTS, STATE, LOG = "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"
BEST = "best_adapter.safetensors"
logger = logging.getLogger(__name__)


def save(
    folder: Path,
    model: PeftModel,
    parts: dict[str, Any],
    log: dict[str, Any],
    keep: int,
    best: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `folder/step-N` atomically, and remove all but the newest checkpoints.

    Args:
        folder: Folder with the checkpoints of one training.
        model: Model with the adapter to save.
        parts: Objects with a `state_dict`, by name.
        log: JSON-serializable training log; `log["step"]` is the number of completed steps.
        keep: Number of checkpoints to keep.
        best: Adapter of the best step so far, if the training keeps one.
    """
    target = folder / f"step-{log['step']:08d}"
    partial = folder / f".{target.name}.{os.getpid()}"
    partial.mkdir(parents=True)
    save_file(weights_of(model), partial / WEIGHTS)
    if best:
        save_file(dict(best), partial / BEST)
    torch.save({name: part.state_dict() for name, part in parts.items()}, partial / STATE)
    (partial / LOG).write_text(json.dumps(log), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def weights_of(model: PeftModel) -> dict[str, Tensor]:
    """Weights of the adapter by name, as PEFT saves them."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return weights


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint, on the CPU.

    Attributes:
        folder: Folder of the checkpoint; None if another process sent it.
        weights: Weights of the adapter by name.
        best: Weights of the adapter of the best step; empty without one.
        parts: State dictionaries by name.
        log: Training log.
    """

    folder: Path | None
    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    parts: dict[str, Any]
    log: dict[str, Any]


def load_newest(
    folder: Path, model: PeftModel, parts: dict[str, Any], process: DistributedContext
) -> Checkpoint | None:
    """Restore the newest checkpoint that any process can read into `model` and `parts`.

    Machines that were started at different times may have different checkpoints. Processes without the newest one
    receive it from a process that has it.

    Returns:
        The restored checkpoint, or None if no process has one.
    """
    restored = _newest(folder)
    steps = process.everyones(restored.log["step"] if restored else -1)
    if max(steps) < 0:
        return None
    if min(steps) < max(steps):
        newest = steps.index(max(steps))
        restored = _shared(restored if process.rank == newest else None, process, newest)
    assert restored
    set_weights(model, restored.weights, process.device)
    for name, part in parts.items():
        part.load_state_dict(restored.parts[name])
    return restored


def newest_log(folder: Path, process: DistributedContext) -> dict[str, Any]:
    """Training log of the newest checkpoint of any process; empty if no process has one."""
    return max(process.everyones(_newest_log(folder)), key=lambda log: int(log.get("step", -1)))


def _newest_log(folder: Path) -> dict[str, Any]:
    for checkpoint in reversed(_checkpoints(folder)):
        with suppress(OSError, ValueError):  # an unreadable checkpoint is reported when it is loaded
            log = json.loads((checkpoint / LOG).read_text(encoding="utf-8"))
            return {"step": log["step"], "active": log["active"]}
    return {}


def set_weights(model: PeftModel, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the weights of the adapter."""
    set_peft_model_state_dict(model, {name: weight.to(device) for name, weight in weights.items()})


def _shared(checkpoint: Checkpoint | None, process: DistributedContext, of: int) -> Checkpoint:
    """Send the files of a checkpoint of rank `of` to all processes, which read them like files of their own."""
    folder = checkpoint.folder if checkpoint else None
    files = {name: folder / name for name in (WEIGHTS, BEST, STATE, LOG)} if folder else {}
    weights, best, state, log = (
        process.share_bytes(files[name].read_bytes() if name in files and files[name].exists() else b"", of)
        for name in (WEIGHTS, BEST, STATE, LOG)
    )
    parts = torch.load(BytesIO(state), map_location="cpu", weights_only=True)
    return Checkpoint(folder, load(weights), load(best) if best else {}, parts, json.loads(log))


def _newest(folder: Path) -> Checkpoint | None:
    for checkpoint in reversed(_checkpoints(folder)):
        try:
            return Checkpoint(
                checkpoint,
                load_file(checkpoint / WEIGHTS),
                load_file(checkpoint / BEST) if (checkpoint / BEST).exists() else {},
                torch.load(checkpoint / STATE, map_location="cpu", weights_only=True),
                json.loads((checkpoint / LOG).read_text(encoding="utf-8")),
            )
        except (OSError, EOFError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as e:
            logger.warning("Checkpoint %s cannot be read (%s); falling back to the previous one", checkpoint, e)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
