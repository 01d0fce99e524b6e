"""Launch a job from a Dagster asset: the worker's rank 0 reports to the run through Dagster Pipes."""

import dagster as dg

from finetune_assets.launch.job import JobSpec
from finetune_assets.launch.local import LocalLauncher
from finetune_assets.store.artifacts import ArtifactRef


def run_in_pipes(context: dg.AssetExecutionContext, launcher: LocalLauncher, spec: JobSpec) -> ArtifactRef:
    """Run a job inside a Pipes session and return its artifact.

    Raises:
        JobFailed: with the worker's own error.
    """
    injector, reader = dg.PipesTempFileContextInjector(), dg.PipesTempFileMessageReader()
    with dg.open_pipes_session(context, injector, reader) as session:
        return launcher.run(spec, session.get_bootstrap_env_vars())
