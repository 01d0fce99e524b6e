"""Assign GPUs of this machine to a job: GPUs that no other job holds.

FINETUNE_GPUS_PER_JOB: number of GPUs for a job with `training.processes_per_node: auto`; all GPUs by default. With
    several slots in Dagster's pool `gpu`, the machine needs this number of GPUs for each slot.
"""

import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune_assets.errors import UserError
from finetune_assets.store.locks import Lock

POLL_SECONDS, TRIES = 0.5, 3
FOLDER = Path(tempfile.gettempdir()) / "finetune-gpus"
FOLDER_MODE, LOCK_MODE = 0o1777, 0o666
"""In a sticky folder, only a file's owner can remove or replace it."""
logger = logging.getLogger(__name__)


class TooFewGPUs(UserError):
    """A job requires more GPUs than this machine has."""


def visible() -> list[str]:
    """Return this machine's GPUs as named in CUDA_VISIBLE_DEVICES; empty without a GPU."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices == "" or not shutil.which("nvidia-smi"):
        return []
    if devices:
        return devices.split(",")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE) if listed.returncode == 0 else []


@contextmanager
def held(processes: str | None, folder: Path | None = None) -> Iterator[list[str]]:
    """Reserve GPUs for this job until the block exits or the process dies. Yields an empty list without a GPU.

    Args:
        processes: Number of processes, one per GPU: a number, `auto`, or None for one.
        folder: Folder of the lock files shared by the jobs on this machine.

    Raises:
        TooFewGPUs: If the machine has fewer GPUs than the job needs.
        UserError: If the folder or a lock file is not what another job would have created.
    """
    devices = visible()
    count = wanted(processes, devices)
    folders = [folder] if folder else _folders()
    for shared in folders if devices else ():
        _create_for_all_users(shared)
    locks = {gpu: Lock(folders[-1] / f"{gpu}.lock", LOCK_MODE) for gpu in devices}
    logged = False
    while True:
        acquired = [gpu for gpu, lock in locks.items() if lock.acquire(blocking=False)]
        if len(acquired) >= count:
            break
        for gpu in acquired:  # all or nothing: two jobs that each hold a part would deadlock
            locks[gpu].release()
        if not logged:
            logger.info("Waiting for %d of the GPUs %s, which are held by other jobs", count, ", ".join(devices))
            logged = True
        time.sleep(POLL_SECONDS)
    for gpu in acquired[count:]:
        locks[gpu].release()
    try:
        yield acquired[:count]
    finally:
        for gpu in acquired[:count]:
            locks[gpu].release()


def _folders() -> list[Path]:
    """Return the folder of lock files after its parents.

    There is one per Slurm job, because Slurm numbers the GPUs of each job from 0.
    """
    slurm = os.environ["SLURM_JOB_ID"] if os.environ.get("SLURM_JOB_GPUS") else ""
    return [FOLDER, FOLDER / slurm] if slurm else [FOLDER]


def _create_for_all_users(path: Path) -> None:
    """Create a folder in which every user of this machine can create files, and cannot replace others' files.

    Raises:
        UserError: If another user has created something else at the path.
    """
    with suppress(FileExistsError):
        path.mkdir()
    for _ in range(TRIES):
        if _is_for_all_users(path):
            return
        time.sleep(POLL_SECONDS)  # another user creates it at this moment
    raise UserError(
        f"{path}: owned by another user, and not of mode {FOLDER_MODE:o}, so that jobs of several users cannot lock "
        "GPUs safely; ask its owner to remove it"
    )


def _is_for_all_users(path: Path) -> bool:
    """Whether a folder has the mode for all users, which is set if this user owns the folder.

    Raises:
        UserError: If it is a link, or not a folder.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as e:
        raise UserError(f"{path}: not a folder of GPU locks ({e.strerror}); remove it, or ask its owner to") from e
    try:
        status = os.fstat(folder)
        if stat.S_IMODE(status.st_mode) & FOLDER_MODE == FOLDER_MODE:
            return True
        if status.st_uid != os.geteuid():
            return False
        os.fchmod(folder, FOLDER_MODE)
        return True
    finally:
        os.close(folder)


def wanted(processes: str | None, devices: list[str]) -> int:
    """Return the number of GPUs for a job.

    Args:
        processes: Number of processes, one per GPU: a number, `auto`, or None for one.
        devices: GPUs of this machine.

    Raises:
        TooFewGPUs: If the machine has fewer GPUs, or FINETUNE_GPUS_PER_JOB is not a positive number.
    """
    if not devices:
        return 0
    if processes is None:
        return 1
    count = os.environ.get("FINETUNE_GPUS_PER_JOB") or str(len(devices)) if processes == "auto" else processes
    if not count.isdecimal() or not int(count):
        raise TooFewGPUs(f"FINETUNE_GPUS_PER_JOB: '{count}' is not a positive number of GPUs")
    if int(count) > len(devices):
        raise TooFewGPUs(
            f"Too few GPUs: {count} processes need one GPU each, this machine has {len(devices)}; lower "
            "training.processes_per_node or FINETUNE_GPUS_PER_JOB"
        )
    return int(count)
