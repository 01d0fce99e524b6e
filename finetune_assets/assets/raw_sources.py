"""Reads each source of the raw data, and evaluates the checks of each."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
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
from finetune_assets.display import shown_url
from finetune_assets.errors import UserError
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.json_object import read_json

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
            if ref := newest_version(project.store(), lineage.stream):
                sources[name] = ReadSource(lineage, ref, True, statistics_of(project, ref), str(e))
            context.log.warning(f"Source {name} is not available ({e}); {_state(sources.get(name))}")
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

    store, made_from = project.store(), {"source": shown_url(source.config.source), "content": source.content}

    def build(folder: Path) -> None:
        threshold = THRESHOLD if source.config.checks.near_duplicates == "minhash" else None
        statistics = write_raw(source.source.files(), source.config.columns, folder, threshold, source.config.processes)
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
    return asdict(RawStatistics()) | read_json(folder / STATISTICS, f"{ref.kind}/{ref.name}")


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


@dataclass(frozen=True)
class CheckedSources:
    """Results of the checks, and what they leave to be used.

    Attributes:
        results: One result for each check.
        used: The sources whose versions are used.
        held_back: Sources whose newest version failed blocking checks, with the names of these checks. An earlier
            version of them is used, or none.
        good: Whether all versions that are used have passed their blocking checks.
    """

    results: list[dg.AssetCheckResult]
    used: dict[str, ReadSource]
    held_back: dict[str, str] = field(default_factory=dict)
    good: bool = True

    @property
    def profiles(self) -> dict[str, Profile]:
        return {name: Profile.of(source.statistics) for name, source in self.used.items()}


def evaluate_checks(
    context: dg.AssetExecutionContext, project: Project, raw: RawLineage, sources: Mapping[str, ReadSource]
) -> CheckedSources:
    """Evaluate all checks for each source, and record the good versions of sources.

    Of several sources, one whose version fails a blocking check is replaced by its last good version, and left out
    without one, so that it holds back no other source.
    """
    by_source, used, held_back = {}, {}, {}
    for name, source in sources.items():
        previous = last_good(context.instance, source.ref.fingerprint, raw.source_name, name)
        version = Version(context, source.statistics, source.lineage.config, previous)
        by_source[name] = [check.evaluate(version) for check in RAW_CHECKS]
        failed = [result.check_name or "" for result in by_source[name] if not result.passed]
        if failed := [check for check in failed if check in BLOCKING]:
            held_back[name] = ", ".join(failed)
            if last := newest_version(project.store(), source.lineage.stream):
                used[name] = replace(source, ref=last, hit=True, statistics=statistics_of(project, last))
        else:
            record_good(project.store(), source.lineage.stream, source.ref.fingerprint)
            used[name] = source
    if len(raw.sources) == 1:
        return CheckedSources(next(iter(by_source.values())), dict(sources), good=not held_back)
    good = bool(used)
    if not good:
        used, held_back = dict(sources), {}
    states = {name: _state(used.get(name)) for name in held_back}
    for name, state in states.items():
        context.log.warning(f"Source {name} failed {held_back[name]}; {state}")
    of_check = zip(*by_source.values(), strict=True)
    results = [_combined(dict(zip(sources, each, strict=True)), states) for each in of_check]
    return CheckedSources(results, used, held_back, good)


def _state(used: ReadSource | None) -> str:
    """What is used of a source that is not available, or whose newest version is bad."""
    return f"using its version {used.ref.fingerprint[:12]}" if used else "experiments that use it will fail"


def _combined(results: Mapping[str, dg.AssetCheckResult], states: Mapping[str, str]) -> dg.AssetCheckResult:
    """One result of the same check for all sources: it passes if it passes for each of them.

    Args:
        results: The result of each source.
        states: What is used of the sources that are held back.
    """
    failed = {name: result for name, result in results.items() if not result.passed}
    first = next(iter((failed or results).values()))
    held_back = [f"{name}: {states[name]}" for name in failed if name in states and first.check_name in BLOCKING]
    return dg.AssetCheckResult(
        passed=not failed,
        check_name=first.check_name,
        severity=first.severity,
        description="; ".join([*(f"{name}: {result.description}" for name, result in results.items()), *held_back]),
        metadata={
            f"{name}: {key}": value
            for name, result in results.items()
            for key, value in (result.metadata or {}).items()
        },
    )
