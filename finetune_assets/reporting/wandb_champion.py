"""A champion as an artifact of Weights & Biases, `champion-EXPERIMENT`: each promotion moves its alias `champion`.

dagster-wandb cannot do it: its IO manager waits for the upload also where there is none, and importing it imports wandb
into the process that loads the definitions. So wandb's own client does, in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from finetune_assets.artifacts.champions import Champions, Record
from finetune_assets.config.fingerprint import fingerprint
from finetune_assets.config.schema import Wandb
from finetune_assets.store.artifacts import ArtifactStore
from finetune_assets.store.modes import make_folders

MODULE = "finetune_assets.training.wandb_champion"
ALIAS = "champion"
TIMEOUT_SECONDS = 900


def log_champion(
    settings: Wandb | None, record: Record, store: ArtifactStore, write_line: Callable[[str], None]
) -> dict[str, str]:
    """Log a champion, if the experiment logs its adapters; a failure of W&B is reported, and raises nothing.

    Args:
        settings: Settings of the experiment.
        record: The champion's record.
        store: Has the adapter; wandb writes the run into its cache, from which an offline run is uploaded.
        write_line: Receives each line of text.

    Returns:
        Where it is found: `artifact` and `url`, or `folder` and the command `sync` if it was recorded offline. Empty if
        it was not logged.
    """
    if settings is None or not settings.log_model:
        return {}
    adapter, cache = store.fetch(Champions(store, record.experiment).adapter(record)), store.cache.root
    name = f"{ALIAS}-{record.experiment}"
    begin: dict[str, Any] = {
        "project": settings.project,
        "entity": settings.entity,
        "name": f"{record.experiment} champion {record.number}",
        "id": fingerprint(experiment=record.experiment, number=record.number, adapter=record.adapter)[:32],
        "mode": settings.mode,
        "config": {},
        "tags": [record.experiment, ALIAS],
        "job_type": "promotion",
        "log_model": True,
        "artifact": f"{name}:{ALIAS}",
        "pid": os.getpid(),
    }
    metadata = {
        "fingerprint": record.adapter,
        "record": record.number,
        "action": record.action,
        "reason": record.reason,
    }
    aliases = [ALIAS, f"record-{record.number}"]
    request = {
        "begin": begin,
        "adapter": {"folder": str(adapter), "metadata": metadata, "name": name, "aliases": aliases},
    }
    make_folders(cache)
    folders = {"WANDB_DIR": str(cache), "WANDB_DATA_DIR": str(cache / "wandb")}
    try:
        ended = subprocess.run(
            [sys.executable, "-m", MODULE],
            input=json.dumps(request),
            env={**os.environ, **folders},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=True,
        )
        answer = json.loads(ended.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        write_line(
            f"Weights & Biases: the champion was not logged ({type(e).__name__}); training and store are not affected"
        )
        return {}
    for line in answer.pop("lines"):
        write_line(line)
    if "folder" in answer and "url" not in answer:
        reason = f"{answer['why']}; " if "why" in answer else ""
        write_line(
            f"Weights & Biases: {reason}champion recorded in {answer['folder']}; upload it with: {answer['sync']}"
        )
    return {key: str(answer[key]) for key in ("artifact", "url", "folder", "sync") if key in answer}
