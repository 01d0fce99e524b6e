"""What every asset does around its own work: reuse or make an artifact, and describe it to Dagster."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts.kinds import ArtifactKind
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import Experiment, dump
from finetune_assets.errors import UserError
from finetune_assets.resources.project import OVERRIDES_TAG, Project
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.worker.job import JobSpec

GROUP = "finetune"
"""One group: with several, Dagster's global lineage opens as closed boxes."""
RETRIES, RETRY_SECONDS = 3, 20
"""How often a step is tried again, and after how long at first; each time twice as long."""
ARTIFACT = dg.PythonObjectDagsterType(ArtifactRef)
"""Type of an asset that has checks: Dagster 1.13 reads it from `MaterializeResult[...]` where there are none only."""


@dataclass(frozen=True)
class Outcome:
    """An artifact and how it came to be.

    Attributes:
        ref: The artifact.
        hit: Whether the store had it already.
        seconds: How long it took.
    """

    ref: ArtifactRef
    hit: bool
    seconds: float


def materialize_or_reuse(
    context: dg.AssetExecutionContext,
    project: Project,
    kind: ArtifactKind,
    name: str,
    make: Callable[[], ArtifactRef],
    called: str = "",
    anew: bool = False,
) -> Outcome:
    """Return the artifact of that name from the store, or make it; `force` makes it anyway.

    Of several runs on this machine that want the same, one makes it, and the others wait and take it.

    Args:
        context: Of the asset.
        project: The run's.
        kind: Of the artifact.
        name: Of the artifact.
        make: Makes and publishes it.
        called: What the log calls it, where the asset makes more than one.
        anew: Make it as `force` does.
    """
    began, store = time.monotonic(), project.store()
    find = (lambda: None) if project.force or anew else (lambda: store.find(kind.folder, name))
    found = find()
    if found is None:
        with store.cache.alone(store.prefix(kind.folder, name), f"makes {kind.folder}/{name}"):
            found = find()
            ref = found or make()
    else:
        ref = found
    if found:
        context.log.info(f"Cache hit: reusing {kind.folder}/{name} (same inputs, settings and code)")
    context.log.info(f"{called or context.asset_key.to_user_string()} stored at {ref.uri.removeprefix('file://')}")
    return Outcome(ref, found is not None, time.monotonic() - began)


def publish_built(
    project: Project,
    kind: ArtifactKind,
    name: str,
    fingerprint: str,
    made_from: Mapping[str, Any],
    build: Callable[[Path], None],
    replace: bool = False,
) -> ArtifactRef:
    """Let `build` fill an empty folder and publish it; if it fails, nothing is left."""
    store = project.store()
    with store.cache.workspace("build") as folder:
        build(folder)
        return store.publish(folder, kind.folder, name, fingerprint, made_from, replace=project.force or replace)


def job(project: Project, experiment: Experiment, **spec: Any) -> JobSpec:
    """A job on this deployment's store with the experiment's settings; `spec` says what is its own."""
    store = project.store()
    return JobSpec(
        config=dump(experiment.config),
        store=store.url,
        namespace=store.namespace,
        cache=str(store.cache.root),
        cache_limit=store.cache.limit,
        replace=project.force,
        settings=experiment.config.launcher,
        **spec,
    )


def result(
    made: Outcome, checks: Sequence[dg.AssetCheckResult] = (), tags: Mapping[str, str] | None = None, **metadata: Any
) -> dg.MaterializeResult[ArtifactRef]:
    """What an asset returns: the reference, its fingerprint as data version, its checks, and what there is to see."""
    uri = made.ref.uri
    is_local = uri.startswith("file://")
    common = {
        "cache_hit": made.hit,
        "duration_s": round(made.seconds, 2),
        "uri": dg.MetadataValue.path(uri.removeprefix("file://")) if is_local else dg.MetadataValue.url(uri),
        "files": made.ref.files,
        "bytes": made.ref.size,
    }
    return dg.MaterializeResult(
        value=made.ref,
        data_version=dg.DataVersion(made.ref.fingerprint),
        metadata={**metadata, **common},
        check_results=list(checks),
        tags=tags,
    )


def refuse_stacked_experiment(experiment: Experiment) -> None:
    """Fail for an experiment that combines adapters in place of training one."""
    if experiment.config.stack:
        raise ConfigError(
            f"experiment {experiment.name}",
            "stack",
            "combines adapters and is not trained; materialize stacked_adapter instead",
        )


def check_skipped(context: dg.AssetExecutionContext, check: str, why: str) -> dg.AssetCheckResult:
    """What an asset tells instead of a materialization where there is nothing for it; its check passes."""
    context.log.info(f"Skipped: {why}")
    return dg.AssetCheckResult(passed=True, check_name=check, description=f"Check skipped: {why}")


def trains_later(context: dg.AssetExecutionContext) -> bool:
    """Whether this run also trains an adapter."""
    selected = context.run.asset_selection
    return selected is None or dg.AssetKey("lora_adapter") in selected


def overridden(experiment: Experiment) -> dict[str, str]:
    """Tags of what was made with settings of one run alone: nothing that happens by itself goes by it."""
    return {OVERRIDES_TAG: str(len(experiment.overrides))} if experiment.overrides else {}


def fraction_check(
    context: dg.AssetExecutionContext,
    name: str,
    count: int,
    total: int,
    most: float,
    problem: str,
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
    **metadata: Any,
) -> dg.AssetCheckResult:
    """A check that fails where more than a share of the rows is bad, and names the first of them.

    Args:
        context: Of the asset; a failure is told in its log.
        name: Of the check.
        count: Bad rows.
        total: All rows.
        most: Largest share that passes.
        problem: What is wrong with the bad rows, the setting of `most`, and the first of them.
        severity: A failure with WARN is told, and stops nothing.
        metadata: More to see.
    """
    share = count / total if total else 0.0
    told = f"{count:,} of {total:,} rows ({share:.2%}) {problem}" if count else "No such rows"
    if share > most:
        tell = context.log.error if severity is dg.AssetCheckSeverity.ERROR else context.log.warning
        tell(f"Check {name} failed: {told}")
    return dg.AssetCheckResult(
        passed=share <= most,
        check_name=name,
        severity=severity,
        description=told,
        metadata={"rows": count, "fraction": share, "threshold": most, **metadata},
    )


class _RunLog(logging.Handler):
    """Tells what this project logs in the Dagster run."""

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        super().__init__(logging.INFO)
        self.log = context.log

    def emit(self, record: logging.LogRecord) -> None:
        self.log.log(record.levelno, record.getMessage())


@contextmanager
def asset_step(context: dg.AssetExecutionContext, retried: bool = False) -> Iterator[None]:
    """Tell in the run what is going on, and fail the step with the error's text alone.

    Args:
        context: Of the asset.
        retried: Try the step again where a machine failed or was taken away, or a server did not answer; not where a
            person must mend something, or has ended the run. Dagster's own retry policy starts a run again that a
            person terminated, so no asset has one.
    """
    package, handler = logging.getLogger("finetune_assets"), _RunLog(context)
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    except (dg.Failure, dg.RetryRequested):
        raise
    except Exception as e:
        failure = _told(e)
        if retried and _may_pass(e):
            pause = RETRY_SECONDS * 2**context.retry_number * random.uniform(0.5, 1.5)
            if context.retry_number < RETRIES:
                context.log.warning(
                    f"Retrying in {pause:.0f} s (attempt {context.retry_number + 1} of {RETRIES}): {failure}"
                )
            raise dg.RetryRequested(max_retries=RETRIES, seconds_to_wait=pause) from failure
        if failure is e:
            raise
        raise failure from (None if isinstance(e, UserError) else e)
    finally:
        package.removeHandler(handler)


def _told(error: Exception) -> Exception:
    """What a step fails with: one line that says what to do, where that is known."""
    if isinstance(error, UserError):
        return dg.Failure(str(error), allow_retries=False)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        told = f"{error.strerror or error}{where}; check FINETUNE_STORE, FINETUNE_CACHE and the free disk space"
        return dg.Failure(told, allow_retries=False)
    return error


def _may_pass(error: Exception) -> bool:
    """Whether the same may succeed with nothing mended."""
    if isinstance(error, UserError):
        return error.retriable
    return not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError)
