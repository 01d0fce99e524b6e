"""Reads each source of the raw data, and evaluates the checks of each."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.artifacts.aliases import SAME_AS
from finetune_assets.artifacts.kinds import RAW
from finetune_assets.artifacts.raw_lineage import PARTS, RawLineage, SourceLineage, combined
from finetune_assets.artifacts.streams import newest_version, record_good
from finetune_assets.assets.materialization import RETRIES, Outcome, materialize_or_reuse, publish_built
from finetune_assets.assets.raw_checks import BLOCKING, RAW_CHECKS
from finetune_assets.assets.raw_checks.check import Version
from finetune_assets.assets.raw_checks.profile import Profile, last_good
from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef

STATISTICS, SOURCES = "statistics.json", "sources.json"
FILES = 20
"""Maximum number of ignored files in the log and in the metadata."""


@dataclass(frozen=True)
class ReadSource:
    """One source, as a run has read it.

    Attributes:
        lineage: The source.
        ref: The version whose rows are used.
        hit: Whether the store had it already.
        statistics: Its statistics.
        away: Why the source could not be read, so that an earlier version is used; empty if it was read.
    """

    lineage: SourceLineage
    ref: ArtifactRef
    hit: bool
    statistics: dict[str, Any]
    away: str = ""


def read_sources(context: dg.AssetExecutionContext, project: Project, raw: RawLineage) -> dict[str, ReadSource]:
    """Read all sources.

    Of several sources, one that is not available, after retries, is replaced by its last good version, if the store has
    one, and left out otherwise; the error is logged. Files that are available but cannot be read fail the step.

    Raises:
        UserError: if no source is available, or a file cannot be read.
    """
    sources: dict[str, ReadSource] = {}
    errors: list[UserError] = []
    for name, lineage in raw.sources.items():
        try:
            _ = lineage.fingerprint
        except UserError as e:
            if not lineage.several or not is_away(lineage, e) or (e.retriable and context.retry_number < RETRIES):
                raise
            errors.append(e)
            ref = newest_version(project.store(), lineage.stream)
            if ref:
                sources[name] = ReadSource(lineage, ref, True, statistics_of(project, ref), str(e))
            state = f"using its version {ref.fingerprint[:12]}" if ref else "experiments that use it will fail"
            context.log.warning(f"Source {name} is not available ({e}); {state}")
        else:
            sources[name] = _read(context, project, raw, lineage)
    if all(source.away for source in sources.values()):
        raise errors[0]
    return sources


def is_away(source: SourceLineage, error: UserError) -> bool:
    """Whether an error means that a source is not available, rather than that it cannot be read."""
    if error.retriable or source.config.source.startswith("hf://"):
        return True
    return "://" not in source.config.source and not Path(source.context.root, source.source_name).exists()


def _read(context: dg.AssetExecutionContext, project: Project, raw: RawLineage, source: SourceLineage) -> ReadSource:
    from finetune_assets.data.errors import DataError
    from finetune_assets.data.ingest import PARQUET, write_raw
    from finetune_assets.data.near_duplicates import THRESHOLD
    from finetune_assets.data.raw_files import same_rows

    store, made_from = project.store(), {"source": source.config.source, "content": source.content}

    def build(folder: Path) -> None:
        threshold = THRESHOLD if source.config.checks.near_duplicates == "minhash" else None
        statistics = write_raw(source.source.files(), source.config.columns, folder, threshold)
        statistics.ignored_files = [*source.source.ignored_files()]
        if not source.is_unchanged():
            raise DataError(f"{source.config.source}: rows changed during the read; materialize dolly_raw again")
        (folder / STATISTICS).write_text(json.dumps(asdict(statistics)), encoding="utf-8")
        for earlier in source.earlier_fingerprints():
            if (ref := store.find(RAW.folder, earlier)) and same_rows(store.fetch(ref) / PARQUET, folder / PARQUET):
                made_from[SAME_AS] = earlier

    def make() -> ArtifactRef:
        return publish_built(project, RAW, source.fingerprint, source.fingerprint, made_from, build)

    outcome = materialize_or_reuse(context, project, RAW, source.fingerprint, make)
    used = store.resolve(RAW.folder, raw.known(source), made_by="dolly_raw")
    statistics = statistics_of(project, outcome.ref)
    if not source.source.is_pinned:  # other files may come and go while the rows are the same
        statistics["ignored_files"] = [*source.source.ignored_files()]
    if ignored := statistics["ignored_files"]:
        context.log.info(f"Files that are not read: {len(ignored):,}, such as {', '.join(ignored[:FILES])}")
    return ReadSource(source, used, outcome.hit, statistics)


def statistics_of(project: Project, ref: ArtifactRef) -> dict[str, Any]:
    """Statistics of a version; those that an artifact of an earlier code version lacks have their defaults."""
    from finetune_assets.data.ingest import RawStatistics

    folder = project.store().fetch(ref, lambda path: path == STATISTICS)
    return asdict(RawStatistics()) | json.loads((folder / STATISTICS).read_text(encoding="utf-8"))


def publish_version(project: Project, raw: RawLineage, sources: Mapping[str, ReadSource], seconds: float) -> Outcome:
    """Publish the version that consists of all sources' versions; with a single source, it is that source's version."""
    parts = {name: source.ref.fingerprint for name, source in sources.items()}
    hit = all(source.hit for source in sources.values())
    if len(raw.sources) == 1:
        return Outcome(next(iter(sources.values())).ref, hit, seconds)
    name, store = combined(parts), project.store()

    def build(folder: Path) -> None:
        (folder / SOURCES).write_text(json.dumps(parts, indent=1), encoding="utf-8")

    made_from = {"source": raw.source_name, PARTS: parts}
    ref = store.find(RAW.folder, name) or publish_built(project, RAW, name, name, made_from, build)
    return Outcome(ref, hit, seconds)


def evaluate_checks(
    context: dg.AssetExecutionContext, project: Project, raw: RawLineage, sources: Mapping[str, ReadSource]
) -> tuple[list[dg.AssetCheckResult], dict[str, Profile]]:
    """Evaluate all checks for each source, and record the good versions of sources.

    Returns:
        One result for each check, and the profile of each source.
    """
    by_source, profiles = {}, {}
    for name, source in sources.items():
        previous = last_good(context.instance, source.ref.fingerprint, raw.source_name, name)
        version = Version(context, source.statistics, source.lineage.config, previous)
        by_source[name] = [check.evaluate(version) for check in RAW_CHECKS]
        profiles[name] = version.profile
        if all(result.passed for result in by_source[name] if result.check_name in BLOCKING):
            record_good(project.store(), source.lineage.stream, source.ref.fingerprint)
    if len(raw.sources) == 1:
        return next(iter(by_source.values())), profiles
    of_check = zip(*by_source.values(), strict=True)
    return [_combined(dict(zip(sources, results, strict=True))) for results in of_check], profiles


def _combined(results: Mapping[str, dg.AssetCheckResult]) -> dg.AssetCheckResult:
    """One result of the same check for all sources: it passes if it passes for each of them."""
    failed = {name: result for name, result in results.items() if not result.passed}
    first = next(iter((failed or results).values()))
    return dg.AssetCheckResult(
        passed=not failed,
        check_name=first.check_name,
        severity=first.severity,
        description="; ".join(f"{name}: {result.description}" for name, result in results.items()),
        metadata={
            f"{name}: {key}": value
            for name, result in results.items()
            for key, value in (result.metadata or {}).items()
        },
    )
