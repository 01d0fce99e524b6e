"""Launch a job from a Dagster asset; rank 0 of the worker reports to the run through Dagster Pipes."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.launch.engines import Launcher, PodEngine
from finetune_assets.store.artifacts import JOBS, ArtifactRef
from finetune_assets.store.objects import ObjectStorage
from finetune_assets.worker.job import JobSpec


def run_in_pipes(context: dg.AssetExecutionContext, launcher: Launcher, spec: JobSpec) -> ArtifactRef:
    """Run a job inside a Pipes session and return its artifact.

    Raises:
        JobFailed: with the error that the worker reported.
        UserError: if the engine rejects the job.
    """
    engine = launcher.engine(spec)
    if isinstance(engine, PodEngine) and spec.nodes == (1, 1):
        return engine.run_pod(spec, partial(_run_pod, context))
    with (
        _store_reader(spec) if engine.is_remote else _file_reader() as reader,
        dg.open_pipes_session(context, dg.PipesEnvContextInjector(), reader) as session,
    ):
        return engine.run(spec, session.get_bootstrap_env_vars())


def _run_pod(context: dg.AssetExecutionContext, **pod_arguments: Any) -> None:
    from dagster_k8s import PipesK8sClient

    from finetune_assets.launch.kubernetes import POLL_SECONDS

    client = PipesK8sClient(poll_interval=POLL_SECONDS)
    client.run(context=context, pod_wait_timeout=0, delete_pod_on_completion=False, **pod_arguments)


@contextmanager
def _file_reader() -> Iterator[dg.PipesMessageReader]:
    yield dg.PipesTempFileMessageReader()


@contextmanager
def _store_reader(spec: JobSpec) -> Iterator[dg.PipesMessageReader]:
    """Read messages of another machine from objects or a file in the store, and delete them afterwards."""
    objects, folder = ObjectStorage(spec.store), f"{spec.namespace}/{JOBS}/messages-{uuid.uuid4().hex}"
    if objects.is_local:
        message_folder = Path(objects.path) / folder
        message_folder.mkdir(parents=True)
        try:
            yield dg.PipesFileMessageReader(str(message_folder / "messages.jsonl"))
        finally:
            shutil.rmtree(message_folder, ignore_errors=True)
        return
    try:
        from finetune_assets.worker.s3_messages import Messages  # imports boto3, which only S3 stores need

        yield Messages("/".join(part for part in (objects.path, folder) if part), objects.bucket)
    finally:
        objects.delete([stored.key for stored in objects.listing(folder)])
