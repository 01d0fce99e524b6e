"""Manners of a worker process: it does not outlive its parent, and it says why it failed."""

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
"""Environment variable: where a worker writes what a `UserError` says, as JSON, before it ends."""
FORKSERVER = "FINETUNE_FORKSERVER"
"""Environment variable: socket of the server that forked this process, or `off`; see `launch.warm`."""
OFF = "off"
SPIN_COUNT = "4000"
"""How often a thread of OpenMP looks for work before it sleeps (libgomp's GOMP_SPINCOUNT), some microseconds.

On two cores the demo's training takes three quarters of the time that it takes where threads sleep at once; two at once
take half as long again, and with libgomp's own count 2 to 8 times as long (benchmarks/RESULTS.md).
"""


def openmp_waiting() -> dict[str, str]:
    """Environment in which the threads of a process that computes wait neither too long nor not at all.

    Empty where the user has set OMP_WAIT_POLICY.
    """
    return {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": SPIN_COUNT}


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies, even by SIGKILL (Linux; elsewhere nothing).

    Without it, a killed Dagster step orphans torchrun, and the retry starts a second training beside the first.

    Args:
        parent: Process ID of the parent, where the caller knew it before this process was forked.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def show_as(module: str, arguments: Sequence[str]) -> None:
    """Have `ps` show a forked process as `python -m MODULE ARGUMENTS`, not as the server that it was forked from."""
    from setproctitle import setproctitle

    setproctitle(shlex.join([sys.executable, "-m", module, *arguments]))


def set_threads() -> None:
    """Have a forked process compute with OMP_NUM_THREADS threads, which OpenMP reads only when it is loaded.

    Needed without that variable, too, and before the first threads begin: PyTorch replaces a pool of threads that a
    fork has lost when it is next asked for, and two threads that ask at once find none ("Invalid thread pool!").
    """
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(threads) if threads.isdecimal() else torch.get_num_threads())


def forbid_hub() -> None:
    """See to it that this process reads folders and never asks the Hub.

    Raises:
        RuntimeError: if the Hub's client is loaded already and may ask.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants  # reads the variable when it is first imported

    if not constants.HF_HUB_OFFLINE:
        raise RuntimeError("a worker must not ask the Hub: huggingface_hub was imported before HF_HUB_OFFLINE was set")


def run_worker(module: str) -> None:
    """Run `module.main()` as a worker: it ends with its parent, and leaves its error where the launcher looks.

    The module is imported here, so that an import that fails is told like any other error.
    """
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's own handler, in a rank that it has forked
    if os.environ.get(FORKSERVER, OFF) != OFF:
        show_as(module.rpartition(".")[0], sys.argv[1:])
        set_threads()
    forbid_hub()
    Progress.display = from_environment()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels at each import
    warnings.filterwarnings("ignore", category=FutureWarning)  # what one library says to another
    with lean_imports():
        from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def main() -> None:
        try:
            import_lean(module).main()
        except UserError as e:
            if path := os.environ.get(ERROR_FILE):
                told = {"error": str(e), "retriable": e.retriable}
                Path(path).write_text(json.dumps(told), encoding="utf-8")
            sys.exit(str(e))  # the text alone: a traceback would say nothing more to whom it is for

    main()
