"""Run jobs on this machine."""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from os import environ
from pathlib import Path

from finetune_assets.progress import Progress
from finetune_assets.progress.relay import heard
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.worker import warm
from finetune_assets.worker.bootstrap import Worker, flags, run_worker
from finetune_assets.worker.job import JobFailed, JobSpec

BOOTSTRAP = "finetune_assets.worker.bootstrap"
GRACE_SECONDS = 12
"""Time to save a last checkpoint when a run is terminated interactively, in seconds. If an optimizer step takes longer,
the previous checkpoint is used. A scheduler that preempts the machine signals the bootstrap directly and sets the grace
period itself."""


class LocalEngine:
    """Runs the bootstrap as a child process on this machine."""

    is_remote = False

    def run(self, spec: JobSpec, environment: Mapping[str, str]) -> ArtifactRef:
        """Run a job and wait for its artifact.

        Args:
            spec: The job.
            environment: Variables added to the environment of this process, such as the bootstrap variables of Dagster
                Pipes.

        Raises:
            JobFailed: with the error that the worker reported.
        """
        with (
            tempfile.TemporaryDirectory(prefix="finetune-") as folder,
            heard(Path(folder), Progress.display) as progress_environment,
        ):
            job, result = Path(folder) / "job.json", Path(folder) / "result.json"
            job.write_text(spec.to_json(), encoding="utf-8")
            variables = {**environ, **environment, **progress_environment}
            process = warm.start(BOOTSTRAP, [str(job), str(result)], variables)
            try:
                code = process.wait()
            except BaseException:
                _stop(process)
                raise
            answer = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        if "ref" not in answer:
            killed = {"error": f"the worker's bootstrap process was killed (exit code {code})", "retriable": True}
            answer = {**killed, **answer}
            raise JobFailed(answer["error"], answer["retriable"])
        return ArtifactRef(**answer["ref"])


def run_alone(module: str, arguments: Mapping[str, Path], cache: Path) -> None:
    """Run a worker that needs no GPU, torchrun or store, and wait until it exits.

    Args:
        module: The worker's module.
        arguments: Arguments by name, without leading dashes.
        cache: Node-local folder.

    Raises:
        JobFailed: with the error that the worker reported.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        run_worker(Worker(module, flags(arguments), Path(folder), cache, gpus=[], processes=1))


def _stop(process: warm.Process) -> None:
    """Terminate the bootstrap; the kernel kills its child processes."""
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
