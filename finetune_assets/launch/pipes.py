"""Launch a job from a Dagster asset: the worker's rank 0 reports to the run through Dagster Pipes."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.launch.engines import Engine, Launcher
from finetune_assets.launch.kubernetes import POLL_SECONDS, KubernetesLauncher
from finetune_assets.launch.local import LocalLauncher
from finetune_assets.launch.slurm import SlurmLauncher
from finetune_assets.store.artifacts import JOBS, ArtifactRef
from finetune_assets.store.objects import Objects
from finetune_assets.worker.job import JobSpec

RUNNERS: dict[Engine, Callable[[], LocalLauncher | SlurmLauncher | KubernetesLauncher]] = {
    "local": LocalLauncher,
    "slurm": SlurmLauncher,
    "kubernetes": KubernetesLauncher,
}


def run_in_pipes(context: dg.AssetExecutionContext, launcher: Launcher, spec: JobSpec) -> ArtifactRef:
    """Run a job inside a Pipes session and return its artifact.

    Raises:
        JobFailed: with the worker's own error.
        UserError: if its engine does not take it.
    """
    engine = launcher.engine(spec)
    if engine == "kubernetes" and spec.nodes == (1, 1):
        return KubernetesLauncher().run_pod(spec, partial(_in_pod, context))
    with (
        _through_file() if engine == "local" else _through_store(spec) as reader,
        dg.open_pipes_session(context, dg.PipesEnvContextInjector(), reader) as session,
    ):
        return RUNNERS[engine]().run(spec, session.get_bootstrap_env_vars())


def _in_pod(context: dg.AssetExecutionContext, **wanted: Any) -> None:
    from dagster_k8s import PipesK8sClient

    client = PipesK8sClient(poll_interval=POLL_SECONDS)
    client.run(context=context, pod_wait_timeout=0, delete_pod_on_completion=False, **wanted)


@contextmanager
def _through_file() -> Iterator[dg.PipesMessageReader]:
    yield dg.PipesTempFileMessageReader()


@contextmanager
def _through_store(spec: JobSpec) -> Iterator[dg.PipesMessageReader]:
    """Messages from another machine, in objects or in a file of the store, which go when they have been read."""
    objects, folder = Objects(spec.store), f"{spec.namespace}/{JOBS}/messages-{uuid.uuid4().hex}"
    if objects.is_local:
        place = Path(objects.path) / folder
        place.mkdir(parents=True)
        try:
            yield dg.PipesFileMessageReader(str(place / "messages.jsonl"))
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return
    try:
        from finetune_assets.worker.s3_messages import Messages  # boto3 is imported where there is S3

        yield Messages("/".join(part for part in (objects.path, folder) if part), objects.bucket)
    finally:
        objects.delete([stored.key for stored in objects.listing(folder)])
