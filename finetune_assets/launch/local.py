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
"""For a last checkpoint, when a person ends a run and looks on. Where a step takes longer, the one before counts; a
scheduler that takes the machine away tells the bootstrap itself, and gives the time that it has."""


class LocalLauncher:
    """Starts the bootstrap as a child of this process."""

    def run(self, spec: JobSpec, environment: Mapping[str, str]) -> ArtifactRef:
        """Run a job and wait for its artifact.

        Args:
            spec: The job.
            environment: Added to this process's own; Dagster Pipes announces itself here.

        Raises:
            JobFailed: with the worker's own error.
        """
        with (
            tempfile.TemporaryDirectory(prefix="finetune-") as folder,
            heard(Path(folder), Progress.display) as telling,
        ):
            job, result = Path(folder) / "job.json", Path(folder) / "result.json"
            job.write_text(spec.to_json(), encoding="utf-8")
            process = warm.start(BOOTSTRAP, [str(job), str(result)], {**environ, **environment, **telling})
            try:
                code = process.wait()
            except BaseException:
                _stop(process)
                raise
            answer = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        if "ref" not in answer:
            killed = {"error": f"the worker's bootstrap was killed (code {code})", "retriable": True}
            answer = {**killed, **answer}
            raise JobFailed(answer["error"], answer["retriable"])
        return ArtifactRef(**answer["ref"])


def run_alone(module: str, arguments: Mapping[str, Path], cache: Path) -> None:
    """Run a worker that needs neither GPU nor torchrun nor store, and wait for its end.

    Args:
        module: The worker.
        arguments: Its arguments by name, without dashes.
        cache: Node-local folder.

    Raises:
        JobFailed: with the worker's own error.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        run_worker(Worker(module, flags(arguments), Path(folder), cache, gpus=[], processes=1))


def _stop(process: warm.Process) -> None:
    """End the bootstrap; the kernel ends whatever it started."""
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
