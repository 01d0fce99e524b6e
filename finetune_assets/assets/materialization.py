"""Steps common to all assets: reuse or create an artifact, and report it to Dagster."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from finetune_assets.artifacts.kinds import ArtifactKind
from finetune_assets.artifacts.lineage import Lineage
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import Experiment, dump
from finetune_assets.display import PlainRecords, message
from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project
from finetune_assets.resources.raw_versions import OVERRIDES_TAG, SOURCE_TAG, TRAINING_VERSION_TAG, source_tag
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.worker.job import JobSpec

if TYPE_CHECKING:
    import pyarrow as pa

RETRIES, RETRY_SECONDS = 3, 20
"""Maximum retries of a step, and the delay before the first retry in seconds, doubled for each further retry."""
TAG_CHARACTERS = 32
"""Characters of a fingerprint in a tag, of which Dagster allows 63."""
ARTIFACT = dg.PythonObjectDagsterType(ArtifactRef)
"""Type of an asset with checks: Dagster 1.13 infers it from `MaterializeResult[...]` only for assets without checks."""


@dataclass(frozen=True)
class Outcome:
    """An artifact and how it was obtained.

    Attributes:
        ref: Reference to the artifact.
        hit: Whether the artifact was already in the store (cache hit).
        seconds: Time to obtain the artifact, in seconds.
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
    force: bool = False,
    find: Callable[[str], ArtifactRef | None] | None = None,
) -> Outcome:
    """Return the artifact with this name from the store, or create it.

    If several runs on this host need the same artifact, one run creates it, and the others wait and reuse it.

    Args:
        context: Context of the asset step.
        project: Project resource of the run. With `project.force`, the artifact is always created.
        kind: Kind of the artifact.
        name: Name of the artifact.
        make: Creates and publishes the artifact.
        called: Name of the artifact in the log, for assets that create several.
        force: Create the artifact even if the store has it.
        find: Finds the artifact by its name; by default, in the store without comparing its files.

    Returns:
        The artifact, whether it was a cache hit, and the duration.
    """
    began, store = time.monotonic(), project.store()

    def existing_artifact() -> ArtifactRef | None:
        if project.force or force:
            return None
        return find(name) if find else store.find(kind.folder, name)

    existing = existing_artifact()
    if existing is None:
        with store.cache.exclusive(store.prefix(kind.folder, name), f"computing {kind.folder}/{name}"):
            existing = existing_artifact()
            ref = existing or make()
    else:
        ref = existing
    if existing:
        context.log.info(f"Cache hit: reusing {kind.folder}/{name} (same inputs, settings and code)")
    context.log.info(f"{called or context.asset_key.to_user_string()} stored at {ref.uri.removeprefix('file://')}")
    return Outcome(ref, existing is not None, time.monotonic() - began)


def publish_built(
    project: Project,
    kind: ArtifactKind,
    name: str,
    fingerprint: str,
    made_from: Mapping[str, Any],
    build: Callable[[Path], None],
    replace: bool = False,
) -> ArtifactRef:
    """Let `build` fill an empty folder, then publish the folder. A failed build leaves no files behind."""
    store = project.store()
    with store.cache.workspace("build") as folder:
        build(folder)
        return store.publish(folder, kind.folder, name, fingerprint, made_from, replace=project.force or replace)


def job(project: Project, experiment: Experiment, **spec: Any) -> JobSpec:
    """Create a job with this deployment's store and the experiment's settings; `spec` holds the remaining fields."""
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
    outcome: Outcome, checks: Sequence[dg.AssetCheckResult] = (), tags: Mapping[str, str] | None = None, **metadata: Any
) -> dg.MaterializeResult[ArtifactRef]:
    """Build an asset's result: the reference, its fingerprint as data version, check results, tags and metadata."""
    uri = outcome.ref.uri
    is_local = uri.startswith("file://")
    common = {
        "cache_hit": outcome.hit,
        "duration_s": round(outcome.seconds, 2),
        "uri": dg.MetadataValue.path(uri.removeprefix("file://")) if is_local else dg.MetadataValue.url(uri),
        "files": outcome.ref.files,
        "bytes": outcome.ref.size,
    }
    return dg.MaterializeResult(
        value=outcome.ref,
        data_version=dg.DataVersion(outcome.ref.fingerprint),
        metadata={**metadata, **common},
        check_results=list(checks),
        tags=tags,
    )


def column_schema(schema: "pa.Schema") -> dg.TableSchema:
    """Columns of a Parquet or Arrow file, as Dagster's UI and catalog show them."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                field.name,
                str(field.type),
                (field.metadata or {}).get(b"doc", b"").decode() or None,
                dg.TableColumnConstraints(nullable=field.nullable),
            )
            for field in schema
        ]
    )


def refuse_stacked_experiment(experiment: Experiment) -> None:
    """Raise ConfigError for an experiment that combines adapters instead of training one."""
    if experiment.config.stack:
        raise ConfigError(
            f"experiment {experiment.name}",
            "stack",
            "combines adapters and is not trained; materialize stacked_adapter instead",
        )


def check_skipped(context: dg.AssetExecutionContext, check: str, why: str) -> dg.AssetCheckResult:
    """Passing check result for an asset that the experiment does not configure and that is not materialized."""
    context.log.info(f"Skipped: {why}")
    return dg.AssetCheckResult(passed=True, check_name=check, description=f"Check skipped: {why}")


def trains_later(context: dg.AssetExecutionContext) -> bool:
    """Whether this run also trains an adapter."""
    selected = context.run.asset_selection
    return selected is None or dg.AssetKey("lora_adapter") in selected


def overridden(experiment: Experiment) -> dict[str, str]:
    """Tags of a materialization with per-run overrides, which automation ignores; empty without overrides."""
    return {OVERRIDES_TAG: str(len(experiment.overrides))} if experiment.overrides else {}


def lineage_tags(lineage: Lineage) -> dict[str, str]:
    """Tags of a materialization: per-run overrides, and the raw data source, by which automation ignores it."""
    return {**overridden(lineage.experiment), SOURCE_TAG: source_tag(lineage.raw.source_name)}


def ignoring_index(lineage: Lineage, **known: ArtifactRef) -> dict[str, str]:
    """Tag of a tokenized dataset: its version for the training, which ignores a change of the documents alone.

    Empty if the experiment is trained again on such a change (`data.retrieval.retrain`), or does not retrieve.
    """
    retrieval = lineage.experiment.config.data.retrieval
    if retrieval is None or retrieval.retrain:
        return {}
    return {TRAINING_VERSION_TAG: lineage.version_without_index(**known)[:TAG_CHARACTERS]}


def fraction_check(
    context: dg.AssetExecutionContext,
    name: str,
    count: int,
    total: int,
    most: float,
    problem: str,
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
    unit: str = "rows",
    **metadata: Any,
) -> dg.AssetCheckResult:
    """Check result that fails if the fraction of invalid rows exceeds a threshold.

    Args:
        context: Context of the asset step; failures are written to its log.
        name: Name of the check.
        count: Number of invalid rows.
        total: Number of all rows.
        most: Largest fraction that passes.
        problem: Description of the problem, with the setting of `most` and the first invalid rows.
        severity: A failure with WARN is logged and does not block downstream assets.
        unit: What is counted.
        metadata: Additional metadata of the check result.
    """
    share = count / total if total else 0.0
    text = message(f"{count:,} of {total:,} {unit} ({share:.2%}) {problem}") if count else f"No such {unit}"
    if share > most:
        log = context.log.error if severity is dg.AssetCheckSeverity.ERROR else context.log.warning
        log(f"Check {name} failed: {text}")
    return dg.AssetCheckResult(
        passed=share <= most,
        check_name=name,
        severity=severity,
        description=text,
        metadata={unit: count, "fraction": share, "threshold": most, **metadata},
    )


class _RunLog(logging.Handler):
    """Forwards this project's log records to the Dagster run."""

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        super().__init__(logging.INFO)
        self.log = context.log
        self.addFilter(PlainRecords())

    def emit(self, record: logging.LogRecord) -> None:
        self.log.log(record.levelno, record.getMessage())


@contextmanager
def asset_step(context: dg.AssetExecutionContext, retried: bool = False) -> Iterator[None]:
    """Forward log records to the Dagster run, and fail the step with the error's message only.

    Args:
        context: Context of the asset step.
        retried: Retry the step if a machine failed or was preempted, or if a server did not respond. Errors that the
            user must fix are not retried, and neither are terminated runs. Dagster's retry policy also restarts runs
            that a user terminated, so no asset uses one.
    """
    package, handler, shown = logging.getLogger("finetune_assets"), _RunLog(context), PlainRecords(lines=True)
    context.log.addFilter(shown)
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    except (dg.Failure, dg.RetryRequested):
        raise
    except Exception as e:
        failure = _as_failure(e)
        if retried and _is_retriable(e):
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
        context.log.removeFilter(shown)


def _as_failure(error: Exception) -> Exception:
    """Convert an error with a known remedy into a failure with a one-line message; return other errors unchanged."""
    if isinstance(error, UserError):
        return dg.Failure(str(error), allow_retries=False)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        problem = f"{error.strerror or error}{where}; check FINETUNE_STORE, FINETUNE_CACHE and the free disk space"
        return dg.Failure(message(problem), allow_retries=False)
    return error


def _is_retriable(error: Exception) -> bool:
    """Whether a retry may succeed without a fix."""
    if isinstance(error, UserError):
        return error.retriable
    return not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError)
