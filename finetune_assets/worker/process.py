"""Behavior of worker processes: they exit with their parent, and report the cause of a failure."""

import ctypes
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from finetune_assets.errors import UserError
from finetune_assets.progress import Progress
from finetune_assets.progress.relay import from_environment
from finetune_assets.worker.model_libraries import import_lean, lean_imports

PR_SET_PDEATHSIG = 1
ERROR_FILE = "FINETUNE_ERROR_FILE"
"""Environment variable: file to which a worker writes a `UserError` as JSON before it exits."""
FORKSERVER = "FINETUNE_FORKSERVER"
"""Environment variable: socket of the server that forked this process, or `off`; see `worker.warm`."""
OFF = "off"
SPIN_COUNT = "4000"
"""How often an OpenMP thread polls for work before it sleeps (libgomp's GOMP_SPINCOUNT), some microseconds in total.

On two cores, the demo's training takes three quarters of the time it takes if threads sleep immediately. Two concurrent
runs take half as long again, and with libgomp's default 2 to 8 times as long (benchmarks/RESULTS.md).
"""


def openmp_waiting() -> dict[str, str]:
    """Return environment variables that make OpenMP threads spin briefly before they sleep.

    Empty if the user has set OMP_WAIT_POLICY.
    """
    return {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": SPIN_COUNT}


def die_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process when its parent dies, even by SIGKILL. Does nothing outside Linux.

    Otherwise a killed Dagster step orphans torchrun, and the retry starts a second training process in parallel.

    Args:
        parent: Process ID of the parent, if known to the caller before this process was forked.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def show_as(module: str, arguments: Sequence[str]) -> None:
    """Set the title of a forked process in `ps` to `python -m MODULE ARGUMENTS` instead of the server's."""
    from setproctitle import setproctitle

    setproctitle(shlex.join([sys.executable, "-m", module, *arguments]))


def set_threads() -> None:
    """Set the number of threads of a forked process to OMP_NUM_THREADS, which OpenMP reads only when it is loaded.

    Required even without that variable, and before the first threads start: PyTorch recreates a thread pool lost in a
    fork at its next use, and two threads that use it at the same time find no pool ("Invalid thread pool!").
    """
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(threads) if threads.isdecimal() else torch.get_num_threads())


def forbid_hub() -> None:
    """Make this process read local folders only and never contact the Hub.

    Raises:
        RuntimeError: If the Hub's client was imported before, in online mode.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants  # reads the variable when it is first imported

    if not constants.HF_HUB_OFFLINE:
        raise RuntimeError(
            "a worker must not contact the Hub: huggingface_hub was imported before HF_HUB_OFFLINE was set"
        )


def run_worker(module: str) -> None:
    """Run `module.main()` as a worker, which exits with its parent and writes its error to a file for the launcher.

    The module is imported here, so that a failing import is reported like any other error.
    """
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # replaces torchrun's handler in a forked rank
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    if os.environ.get(FORKSERVER, OFF) != OFF:
        show_as(module.rpartition(".")[0], sys.argv[1:])
        set_threads()
    forbid_hub()
    Progress.display = from_environment()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns about optional kernels at each import
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecations between libraries
    with lean_imports():
        from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def main() -> None:
        try:
            import_lean(module).main()
        except UserError as e:
            if path := os.environ.get(ERROR_FILE):
                error = {"error": str(e), "retriable": e.retriable}
                Path(path).write_text(json.dumps(error), encoding="utf-8")
            sys.exit(str(e))  # the message only: a traceback would not help the user

    main()
