"""Which of this machine's GPUs a job computes on: those that no other job holds.

FINETUNE_GPUS_PER_JOB: how many a job takes whose experiment does not say (`training.processes_per_node: auto`); all of
    them by default. With more than one slot in Dagster's pool `gpu`, this many times the slots is what is needed.
"""

import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune_assets.errors import UserError
from finetune_assets.store.locks import Lock

POLL_SECONDS = 0.5
FOLDER = Path(tempfile.gettempdir()) / "finetune-gpus"
logger = logging.getLogger(__name__)


class TooFewGPUs(UserError):
    """A job asks for more GPUs than this machine has."""


def visible() -> list[str]:
    """This machine's GPUs, as CUDA_VISIBLE_DEVICES names them; empty where there is none."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said == "" or not shutil.which("nvidia-smi"):
        return []
    if said:
        return said.split(",")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE) if listed.returncode == 0 else []


@contextmanager
def held(processes: str | None, folder: Path | None = None) -> Iterator[list[str]]:
    """GPUs that are this job's alone until the block is left, or the process dies; empty where there is none.

    Args:
        processes: How many processes will compute, one a GPU: a number, `auto`, or None for one.
        folder: Where the jobs of this machine tell one another what they hold.

    Raises:
        TooFewGPUs: if there will never be so many.
    """
    there = visible()
    count = wanted(processes, there)
    folder = folder or _folder()
    locks = {gpu: Lock(_for_all(folder / f"{gpu}.lock")) for gpu in there}
    told = False
    while True:
        mine = [gpu for gpu, lock in locks.items() if lock.acquire(blocking=False)]
        if len(mine) >= count:
            break
        for gpu in mine:  # all or none: two jobs that hold a part each would wait for ever
            locks[gpu].release()
        if not told:
            logger.info("waiting for %d of the GPUs %s, which other jobs hold", count, ", ".join(there))
            told = True
        time.sleep(POLL_SECONDS)
    for gpu in mine[count:]:
        locks[gpu].release()
    try:
        yield mine[:count]
    finally:
        for gpu in mine[:count]:
            locks[gpu].release()


def _folder() -> Path:
    """Of this machine; Slurm numbers each job's GPUs from 0, so that the same number is another GPU in another job."""
    slurm = os.environ["SLURM_JOB_ID"] if os.environ.get("SLURM_JOB_GPUS") else ""
    return FOLDER / slurm


def _for_all(path: Path) -> Path:
    """A file that any user of the machine may lock, whoever was first."""
    with suppress(PermissionError):  # another user has made it, for all
        path.parent.mkdir(exist_ok=True, parents=True)
        path.parent.chmod(0o777)
        path.touch()
        path.chmod(0o666)
    return path


def wanted(processes: str | None, there: list[str]) -> int:
    """How many of the GPUs that are there a job takes.

    Raises:
        TooFewGPUs: if there are not so many, or FINETUNE_GPUS_PER_JOB is no number.
    """
    if not there:
        return 0
    if processes is None:
        return 1
    said = os.environ.get("FINETUNE_GPUS_PER_JOB") or str(len(there)) if processes == "auto" else processes
    if not said.isdecimal() or not int(said):
        raise TooFewGPUs(f"FINETUNE_GPUS_PER_JOB: '{said}' is not a number of GPUs")
    if int(said) > len(there):
        raise TooFewGPUs(
            f"{said} processes need as many GPUs, and this machine shows {len(there)}; lower "
            "training.processes_per_node or FINETUNE_GPUS_PER_JOB"
        )
    return int(said)
