"""First process of a job on every engine: fetch the inputs, run the worker, publish its output.

`python -m finetune_assets.worker.bootstrap JOB.json RESULT.json`
"""

from finetune_assets.worker.process import ERROR_FILE, die_with_parent, openmp_waiting

if __name__ == "__main__":  # not in the fork server, which imports this module for its children
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
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from finetune_assets.data.cores import available_cores
from finetune_assets.errors import UserError
from finetune_assets.progress import Progress
from finetune_assets.progress.relay import from_environment
from finetune_assets.store import modes
from finetune_assets.store.artifacts import SHARED, ArtifactRef, ArtifactStore, open_store
from finetune_assets.store.checkpoints import Checkpoints, Superseded
from finetune_assets.worker import gpus, warm
from finetune_assets.worker.forkserver import TORCHRUN
from finetune_assets.worker.job import JobFailed, JobInvalid, JobSpec, from_json
from finetune_assets.worker.pipes_worker import in_dagster_run, in_terminal
from finetune_assets.worker.rendezvous import ALONE, RANKS_FILE, Meeting, Place

TORCHRUN_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
MEANWHILE_SECONDS = 2
RENDEZVOUS_TIMEOUT = (
    "Rendezvous timeout: not all machines of this job connected within launcher.rendezvous_seconds. Check that each "
    "machine can reach the first one on its port (firewall; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in "
    "launcher.environment), or raise launcher.rendezvous_seconds"
)
TAIL = 60
"""Number of stderr lines to report if the worker left no error file."""


def run(spec: JobSpec, place: Place = ALONE) -> ArtifactRef | None:
    """Run one job, or one machine's part of it, to completion.

    Returns:
        Reference to the published artifact; None on machines other than the leader.

    Raises:
        JobFailed: If the worker fails, with the worker's own error.
        UserError: If an input cannot be fetched or the output cannot be published.
    """
    store = open_store(spec.store, spec.namespace, Path(spec.cache), spec.cache_limit)
    cache = store.cache
    doing = f"computing {spec.kind}/{spec.fingerprint}"
    job_name = place.own(spec.fingerprint)
    with (
        cache.exclusive(f"job-{job_name}", doing),  # two jobs would overwrite each other's checkpoints
        _scratch(spec, cache.scratch(job_name)) as scratch,
        cache.workspace("job") as folder,
        gpus.held(spec.processes) as devices,
    ):
        (folder / "config.yaml").write_text(spec.config, encoding="utf-8")
        (folder / "made_from.json").write_text(json.dumps(spec.made_from), encoding="utf-8")
        uris = {name: ref.uri for name, ref in spec.inputs.items()}
        (folder / "uris.json").write_text(json.dumps(uris), encoding="utf-8")
        (folder / "bases.json").write_text(json.dumps(_base_versions(spec.inputs)), encoding="utf-8")
        with in_dagster_run() if place.leads else nullcontext():
            inputs = {name: store.fetch(ref) for name, ref in spec.inputs.items()}
        arguments = {
            "config": folder / "config.yaml",
            "made-from": folder / "made_from.json",
            "uris": folder / "uris.json",
            "bases": folder / "bases.json",
            "output": _created(folder / "output"),
            **inputs,
            **({"scratch": scratch} if spec.scratch else {}),
        }
        processes = _processes(spec, devices)
        module, meeting = _runner(spec, processes, place, folder)
        worker = Worker(
            module,
            [*meeting.arguments, *flags(arguments)],
            folder,
            Path(spec.cache),
            devices,
            processes,
            meeting.environment,
        )
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


def _base_versions(inputs: Mapping[str, ArtifactRef]) -> dict[str, str]:
    """Version of each base model as `model.trust_remote_code` names it, by name of the input."""
    return {name: "@".join(ref.name.rsplit("/", 1)) for name, ref in inputs.items() if ref.kind == SHARED}


def _publish(store: ArtifactStore, spec: JobSpec, output: Path) -> ArtifactRef:
    return store.publish(output, spec.kind, spec.fingerprint, spec.fingerprint, spec.made_from, spec.replace)


@contextmanager
def _scratch(spec: JobSpec, folder: Path) -> Iterator[Path]:
    """Provide a folder that is kept if the job fails and removed if it succeeds."""
    if spec.ignore_checkpoints:
        shutil.rmtree(folder, ignore_errors=True)
    _created(folder)
    try:
        yield folder
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _created(folder: Path) -> Path:
    modes.make_folders(folder)
    return folder


@dataclass(frozen=True)
class Worker:
    """A worker process and its resources.

    Attributes:
        module: Module to start.
        arguments: Arguments of the module.
        folder: Empty folder for error files.
        cache: Folder for files that outlive the job, such as W&B's.
        gpus: GPUs reserved for the worker; empty to compute on the CPU.
        processes: Number of processes that share this machine's cores.
        environment: Environment variables that override those of this process.
    """

    module: str
    arguments: list[str]
    folder: Path
    cache: Path
    gpus: list[str]
    processes: int
    environment: Mapping[str, str] = field(default_factory=dict)


def _processes(spec: JobSpec, gpus: list[str]) -> int:
    """Return the number of processes to start. `auto` is one per GPU, or one without a GPU."""
    if spec.processes in (None, "auto"):
        return max(1, len(gpus))
    return int(spec.processes)


def _runner(spec: JobSpec, processes: int, place: Place, folder: Path) -> tuple[str, Meeting]:
    """Return the module to start (torchrun or the worker itself), and the first arguments and the environment of it."""
    if spec.processes is None:
        return spec.module, Meeting([])
    meeting = place.meeting(spec.nodes, spec.rendezvous_seconds, folder)
    torchrun = [
        *meeting.arguments,
        f"--nproc-per-node={processes}",
        f"--log-dir={folder}",  # torchrun's own logs, which would otherwise stay in /tmp
        "--signals-to-handle=SIGTERM,SIGHUP,SIGQUIT",  # not SIGINT, see `prepare`
    ]
    if not warm.was_forked():
        return TORCHRUN, replace(meeting, arguments=[*torchrun, "-m", spec.module])
    # torchrun forks the ranks as well, and each runs the module's file in the existing interpreter
    forked = [*torchrun, "--start-method=fork", "--run-path", _file_of(spec.module)]
    return TORCHRUN, replace(meeting, arguments=forked)


def flags(arguments: Mapping[str, Path]) -> list[str]:
    """Return the command-line flags of a worker for arguments by name."""
    return [part for name, path in arguments.items() for part in (f"--{name}", str(path))]


def _file_of(module: str) -> str:
    """Return the file that `python -m MODULE` runs.

    Raises:
        ModuleNotFoundError: If the module does not exist.
    """
    spec = find_spec(module)
    if spec and spec.submodule_search_locations is not None:
        spec = find_spec(f"{module}.__main__")
    if not spec or not spec.origin:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)
    return spec.origin


def run_worker(worker: Worker, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Run a worker, forward its stderr, and wait until it ends.

    Args:
        worker: The worker.
        meanwhile: Callback, called every few seconds while the worker runs.

    Raises:
        JobFailed: If the worker fails, with its own error.
    """
    user_error, crash = worker.folder / "user_error.json", worker.folder / "crash.json"
    environment = {
        "OMP_NUM_THREADS": str(max(1, available_cores() // worker.processes)),
        **openmp_waiting(),
        "WANDB_DIR": str(worker.cache),  # W&B creates a folder `wandb` in it
        "WANDB_DATA_DIR": str(worker.cache / "wandb"),
        **os.environ,
        ERROR_FILE: str(user_error),
        TORCHRUN_ERROR_FILE: str(crash),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", RANKS_FILE):
        environment.pop(name, None)  # set by an enclosing job
    environment |= worker.environment
    if worker.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(worker.gpus)
    process = warm.start(worker.module, worker.arguments, environment, subprocess.PIPE, binds=True)
    tail: deque[str] = deque(maxlen=TAIL)
    # Read in a thread: a child of the worker may keep stderr open after the worker has ended
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
        raise _failure(user_error, crash, tail, process.returncode)


def _pass_on(stream: IO[str], tail: deque[str]) -> None:
    for line in stream:
        sys.stderr.write(line)
        tail.append(line)


def _failure(user_error: Path, crash: Path, tail: deque[str], code: int) -> JobFailed:
    """Return the most specific error that the worker left: its user error, its traceback, or the end of its stderr.

    Failures other than user errors may be caused by the machine and are retriable.
    """
    if user_error.exists():
        answer = json.loads(user_error.read_text(encoding="utf-8"))
        return JobFailed(answer["error"], answer["retriable"], specificity=3)
    if crash.exists():
        message = json.loads(crash.read_text(encoding="utf-8"))["message"]
        if isinstance(message, str):
            return JobFailed(message, retriable=True, specificity=2)
        stack = message.get("extraInfo", {}).get("py_callstack", "")
        return JobFailed(f"{message['message']}\n{stack}", retriable=True, specificity=2)
    stderr = "".join(tail)
    if "RendezvousTimeoutError" in stderr:
        return JobFailed(RENDEZVOUS_TIMEOUT, retriable=True, specificity=1)
    return JobFailed(f"The worker exited with code {code}. Last lines of its stderr:\n{stderr}", retriable=True)


def answer_of(read: Callable[[], JobSpec], place: Place = ALONE) -> dict[str, Any]:
    """Read a job's specification, run the job or one machine's part of it, and return the outcome as a JSON object.

    Raises:
        FileNotFoundError: If there is no such job.
    """
    try:
        spec = read()
    except JobInvalid as e:
        return {"error": str(e), "retriable": False, "specificity": 3}
    try:
        ref = run(spec, place)
        return {"ref": ref.to_dict() if ref else None}
    except UserError as e:
        return {"error": str(e), "retriable": e.retriable, "specificity": getattr(e, "specificity", 3)}
    except Exception as e:
        traceback.print_exc()
        return {"error": f"{type(e).__name__}: {e}", "retriable": True, "specificity": 2}


def prepare() -> None:
    """Exit cleanly on SIGTERM, ignore Ctrl-C, write private files, and log progress to the terminal.

    A terminal sends SIGINT to all its processes. The process that waits for this one then sends SIGTERM, and a training
    saves a checkpoint.
    """
    os.umask(modes.umask())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    Progress.display = from_environment()
    in_terminal()


def main() -> None:
    prepare()
    answer = answer_of(lambda: from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
    sys.exit("error" in answer)


if __name__ == "__main__":
    main()
