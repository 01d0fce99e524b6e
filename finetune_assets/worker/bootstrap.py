"""The first process of a job, wherever it runs: fetch the inputs, run the worker, publish what it made.

`python -m finetune_assets.worker.bootstrap JOB.json RESULT.json`
"""

from finetune_assets.worker.process import ERROR_FILE, die_with_parent, openmp_waiting

if __name__ == "__main__":  # not in the fork server, which imports this for its children
    die_with_parent()

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from finetune_assets.errors import UserError
from finetune_assets.progress import Progress
from finetune_assets.progress.relay import from_environment
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore, open_store
from finetune_assets.store.checkpoints import Checkpoints, Superseded
from finetune_assets.worker import gpus, warm
from finetune_assets.worker.forkserver import TORCHRUN
from finetune_assets.worker.job import JobFailed, JobSpec, from_json
from finetune_assets.worker.pipes_worker import in_dagster_run, in_terminal
from finetune_assets.worker.rendezvous import ALONE, Place

TORCHRUN_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
MEANWHILE_SECONDS = 2
NOT_MET = (
    "the machines of this job did not all meet within launcher.rendezvous_seconds; see that each reaches the first one "
    "on its port (a firewall? NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in launcher.environment?), or raise it"
)
TAIL = 60
"""Lines of the worker's stderr that are told where it left no error of its own."""


def run(spec: JobSpec, place: Place = ALONE) -> ArtifactRef | None:
    """Run one job, or one machine's part of it, to its end.

    Returns:
        What was made; None on a machine that does not lead.

    Raises:
        JobFailed: with the worker's own error.
        UserError: if an input cannot be fetched or the output not be published.
    """
    store = open_store(spec.store, spec.namespace, Path(spec.cache), spec.cache_limit)
    cache = store.cache
    doing = f"makes {spec.kind}/{spec.fingerprint}"
    mine = place.own(spec.fingerprint)
    with (
        cache.alone(f"job-{mine}", doing),  # two would write over one another's checkpoints
        _scratch(spec, cache.scratch(mine)) as scratch,
        cache.workspace("job") as folder,
        gpus.held(spec.processes) as devices,
    ):
        (folder / "config.yaml").write_text(spec.config, encoding="utf-8")
        (folder / "made_from.json").write_text(json.dumps(spec.made_from), encoding="utf-8")
        uris = {name: ref.uri for name, ref in spec.inputs.items()}
        (folder / "uris.json").write_text(json.dumps(uris), encoding="utf-8")
        with in_dagster_run() if place.leads else nullcontext():
            inputs = {name: store.fetch(ref) for name, ref in spec.inputs.items()}
        arguments = {
            "config": folder / "config.yaml",
            "made-from": folder / "made_from.json",
            "uris": folder / "uris.json",
            "output": _made(folder / "output"),
            **inputs,
            **({"scratch": scratch} if spec.scratch else {}),
        }
        processes = _processes(spec, devices)
        module, leading = _runner(spec, processes, place, folder)
        worker = Worker(module, [*leading, *flags(arguments)], folder, Path(spec.cache), devices, processes)
        if not place.leads:
            run_worker(worker)
            return None
        if not spec.scratch:
            run_worker(worker)
            return _publish(store, spec, arguments["output"])
        checkpoints = Checkpoints(store, spec.fingerprint, spec.made_from, scratch, spec.keep_checkpoints)
        if spec.ignore_checkpoints:
            checkpoints.clear(numbers=False)
        checkpoints.fetch_newest()
        try:
            run_worker(worker, checkpoints.publish_new)
        except BaseException as e:
            if not isinstance(e, Superseded):
                checkpoints.publish_new()
            checkpoints.give_up()
            raise
        checkpoints.check_current()
        ref = _publish(store, spec, arguments["output"])
        checkpoints.clear()
        return ref


def _publish(store: ArtifactStore, spec: JobSpec, output: Path) -> ArtifactRef:
    return store.publish(output, spec.kind, spec.fingerprint, spec.fingerprint, spec.made_from, spec.replace)


@contextmanager
def _scratch(spec: JobSpec, folder: Path) -> Iterator[Path]:
    """A folder that keeps what a job that fails has put there, and goes once it succeeds."""
    if spec.ignore_checkpoints:
        shutil.rmtree(folder, ignore_errors=True)
    _made(folder)
    try:
        yield folder
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class Worker:
    """What computes.

    Attributes:
        module: What is started.
        arguments: Its arguments.
        folder: Empty, for what explains a failure.
        cache: For what outlives the job: W&B's folders.
        gpus: Those that are its own; empty where it computes on the CPU.
        processes: How many share this machine's cores.
    """

    module: str
    arguments: list[str]
    folder: Path
    cache: Path
    gpus: list[str]
    processes: int


def _processes(spec: JobSpec, gpus: list[str]) -> int:
    """How many processes to start: `auto` is one a GPU, or one where there is none."""
    if spec.processes in (None, "auto"):
        return max(1, len(gpus))
    return int(spec.processes)


def _cores() -> int:
    """Those that this process may use; a cluster gives a job a part of its machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _runner(spec: JobSpec, processes: int, place: Place, folder: Path) -> tuple[str, list[str]]:
    """The module that is started, torchrun or the worker alone, and its first arguments."""
    if spec.processes is None:
        return spec.module, []
    torchrun = [
        *place.meeting(spec.nodes, spec.rendezvous_seconds),
        f"--nproc-per-node={processes}",
        f"--log-dir={folder}",  # what it writes of its own; it leaves it in /tmp otherwise
    ]
    if not warm.was_forked():
        return TORCHRUN, [*torchrun, "-m", spec.module]
    # torchrun forks the ranks, too, and each runs the module's file in the interpreter that it has
    return TORCHRUN, [*torchrun, "--start-method=fork", "--run-path", _file_of(spec.module)]


def flags(arguments: Mapping[str, Path]) -> list[str]:
    """Arguments by name as a worker's command line has them."""
    return [part for name, path in arguments.items() for part in (f"--{name}", str(path))]


def _file_of(module: str) -> str:
    """The file that `python -m MODULE` runs.

    Raises:
        ModuleNotFoundError: if there is no such module.
    """
    spec = find_spec(module)
    if spec and spec.submodule_search_locations is not None:
        spec = find_spec(f"{module}.__main__")
    if not spec or not spec.origin:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)
    return spec.origin


def run_worker(worker: Worker, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Run a worker with its output passed on, and wait for its end.

    Args:
        worker: The worker.
        meanwhile: Called every few seconds.

    Raises:
        JobFailed: with the worker's own error.
    """
    told, crashed = worker.folder / "user_error.json", worker.folder / "crash.json"
    environment = {
        "OMP_NUM_THREADS": str(max(1, _cores() // worker.processes)),
        **openmp_waiting(),
        "WANDB_DIR": str(worker.cache),  # makes a folder `wandb` in it
        "WANDB_DATA_DIR": str(worker.cache / "wandb"),
        **os.environ,
        ERROR_FILE: str(told),
        TORCHRUN_ERROR_FILE: str(crashed),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)  # of a job around this one
    if worker.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(worker.gpus)
    process = warm.start(worker.module, worker.arguments, environment, subprocess.PIPE, binds=True)
    tail: deque[str] = deque(maxlen=TAIL)
    # Read aside: something that the worker started may hold its stderr open after it has ended
    assert process.stderr
    reader = threading.Thread(target=_pass_on, args=(process.stderr, tail), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(MEANWHILE_SECONDS)
            meanwhile()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    reader.join(timeout=2)
    if process.returncode != 0:
        raise _failure(told, crashed, tail, process.returncode)


def _pass_on(stream: IO[str], tail: deque[str]) -> None:
    for line in stream:
        sys.stderr.write(line)
        tail.append(line)


def _failure(told: Path, crashed: Path, tail: deque[str], code: int) -> JobFailed:
    """The worker's own account of its failure, the most telling one that it left.

    What it did not tell as an error of its user's may be the machine's fault, and be gone in another attempt.
    """
    if told.exists():
        answer = json.loads(told.read_text(encoding="utf-8"))
        return JobFailed(answer["error"], answer["retriable"], telling=3)
    if crashed.exists():
        message = json.loads(crashed.read_text(encoding="utf-8"))["message"]
        if isinstance(message, str):
            return JobFailed(message, retriable=True, telling=2)
        stack = message.get("extraInfo", {}).get("py_callstack", "")
        return JobFailed(f"{message['message']}\n{stack}", retriable=True, telling=2)
    words = "".join(tail)
    if "RendezvousTimeoutError" in words:
        return JobFailed(NOT_MET, retriable=True, telling=1)
    return JobFailed(f"the worker ended with code {code}; its last words:\n{words}", retriable=True)


def answer_of(spec: JobSpec, place: Place = ALONE) -> dict[str, Any]:
    """What became of a job, or of one machine's part of it, as JSON."""
    try:
        ref = run(spec, place)
        return {"ref": ref.to_dict() if ref else None}
    except UserError as e:
        return {"error": str(e), "retriable": e.retriable, "telling": getattr(e, "telling", 3)}
    except Exception as e:
        traceback.print_exc()
        return {"error": f"{type(e).__name__}: {e}", "retriable": True, "telling": 2}


def prepare() -> None:
    """End orderly when told to, and tell in the terminal what is done."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    Progress.display = from_environment()
    in_terminal()


def main() -> None:
    prepare()
    answer = answer_of(from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
    sys.exit("error" in answer)


if __name__ == "__main__":
    main()
