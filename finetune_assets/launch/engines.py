"""Select the engine that runs a job: `launcher.engine` of its experiment, or the environment's default.

FINETUNE_LAUNCHER: name of an engine, `local` by default, for experiments with `launcher.engine: auto`.
"""

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from finetune_assets.config.cluster import AUTO, ENGINES, LauncherSettings
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.worker import warm
from finetune_assets.worker.job import JobSpec

LOCAL = "local"


class Engine(Protocol):
    """Runs jobs. An engine of your own is a class of this form and an entry in `config.cluster.ENGINES`.

    Attributes:
        is_remote: Whether jobs run on other machines, which do not see this machine's files. Their messages then come
            through the store.
    """

    is_remote: bool

    def run(self, spec: JobSpec, environment: Mapping[str, str]) -> ArtifactRef:
        """Run `python -m finetune_assets.worker.bootstrap` for a job, wait for its end, and return its artifact.

        If this process is terminated meanwhile, the engine ends the job.

        Args:
            spec: The job.
            environment: Environment variables that the job needs.

        Raises:
            JobFailed: with the error that the worker reported, and whether a retry may succeed.
            UserError: if the engine rejects the job.
        """


@runtime_checkable
class PodEngine(Protocol):
    """An engine that can run a job of one machine as a pod, followed by Dagster's own Pipes client."""

    def run_pod(self, spec: JobSpec, follow: Callable[..., Any]) -> ArtifactRef: ...


class Launcher:
    """Selects the engine of each job, so that assets do not depend on a particular engine."""

    def engine(self, spec: JobSpec) -> Engine:
        """Return the engine that runs a job.

        Raises:
            UserError: if FINETUNE_LAUNCHER is not an engine, or the engine cannot run the job.
        """
        name = _selected(spec.settings)
        if name == LOCAL and spec.nodes[0] > 1:
            raise UserError(
                f"launcher.nodes: {spec.nodes[0]} nodes require launcher.engine (or FINETUNE_LAUNCHER) slurm or "
                "kubernetes; the local engine supports 1"
            )
        module, _, class_name = ENGINES[name].partition(":")
        engine: Engine = getattr(import_module(module), class_name)()
        if engine.is_remote and spec.store.startswith("file://") and not os.environ.get("FINETUNE_SHARED"):
            raise UserError(
                f"FINETUNE_STORE: '{spec.store}' is a local folder, but {name} jobs run on other machines; use "
                "s3://bucket/prefix, or set FINETUNE_SHARED=1 if all machines share that folder"
            )
        return engine

    def prepare(self, settings: LauncherSettings) -> None:
        """Start importing the workers' dependencies in the background if the engine is `local`.

        Raises:
            UserError: if FINETUNE_LAUNCHER is not an engine.
        """
        if _selected(settings) == LOCAL:
            warm.prepare()


def _selected(settings: LauncherSettings) -> str:
    if settings.engine != AUTO:
        return settings.engine
    name = os.environ.get("FINETUNE_LAUNCHER") or LOCAL
    if name not in ENGINES:
        raise UserError(f"FINETUNE_LAUNCHER: '{name}' is not an engine; use one of {', '.join(ENGINES)}")
    return name
