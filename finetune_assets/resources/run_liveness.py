"""Detection of runs on this host that have lost their process.

Each run holds a lock in FINETUNE_CACHE while it is alive. The kernel frees the lock however the process ends, so a lock
that can be acquired belongs to a run that died: by SIGKILL, out of memory, or in a reboot.
"""

from pathlib import Path

from finetune_assets.resources import deployment
from finetune_assets.store.locks import Lock


def _folder() -> Path:
    return deployment.cache() / "runs"


def acquire_run_lock(run_id: str) -> Lock:
    """Acquire the shared lock of a run; each process of the run holds it until it releases it."""
    lock = Lock(_folder() / run_id)
    lock.acquire(shared=True)
    return lock


def release_run_lock(lock: Lock) -> None:
    """Release a lock of `acquire_run_lock`; the last process of a run removes the file."""
    lock.release()
    remove_run_lock(lock.path.name)


def dead_run_ids() -> list[str]:
    """Ids of the runs that ended without releasing their lock."""
    run_ids = []
    for path in sorted(_folder().glob("*")):
        lock = Lock(path)
        if lock.acquire(blocking=False):
            run_ids.append(path.name)
            lock.release()
    return run_ids


def remove_run_lock(run_id: str) -> None:
    """Remove the lock file of a run, unless a process holds it."""
    lock = Lock(_folder() / run_id)
    if lock.acquire(blocking=False):
        lock.release(remove=True)
