"""Which runs of this machine have lost their process.

Each run holds a lock in FINETUNE_CACHE as long as it lives. The kernel frees it however the process ends, so a lock
that can be taken tells of a run that died: by kill -9, for want of memory, with the machine.
"""

from pathlib import Path

from finetune_assets.resources import deployment
from finetune_assets.store.locks import Lock


def _folder() -> Path:
    return deployment.cache() / "runs"


def hold(run_id: str) -> Lock:
    """What a run of several processes holds in each of them, until it releases it."""
    lock = Lock(_folder() / run_id)
    lock.acquire(shared=True)
    return lock


def release(lock: Lock) -> None:
    """Give back what `hold` gave; the last process of a run takes the file away."""
    lock.release()
    forget(lock.path.name)


def died() -> list[str]:
    """Runs that held a lock and ended without giving it back, by their ids."""
    found = []
    for path in sorted(_folder().glob("*")):
        lock = Lock(path)
        if lock.acquire(blocking=False):
            found.append(path.name)
            lock.release()
    return found


def forget(run_id: str) -> None:
    """Remove the lock of a run, unless a process holds it."""
    lock = Lock(_folder() / run_id)
    if lock.acquire(blocking=False):
        lock.release(remove=True)
