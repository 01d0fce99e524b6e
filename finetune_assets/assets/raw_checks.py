"""What must hold of raw data before anything is made of it."""

from dataclasses import asdict, dataclass
from typing import Any

import dagster as dg

from finetune_assets.assets.materialization import fraction_check
from finetune_assets.config.schema import RawChecks, RawDataConfig
from finetune_assets.resources.project import DATA_VERSION_TAG, GOOD_TAG

PROFILE = "profile"
"""Its metadata: what a later version is compared with."""
LOOKED_BACK = 50
"""Materializations among which the last good version is looked for."""
CATEGORIES = 100


def _spec(name: str, description: str, blocking: bool = True) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset="dolly_raw", blocking=blocking, description=description)


SPECS = [
    _spec("schema", "Each file has valid rows. A file without any has other columns or another format."),
    _spec("quarantine", "Share of invalid rows is at most max_quarantine_share (configs/raw_data.yaml)."),
    _spec("duplicates", "Share of exact duplicate rows is at most checks.max_duplicate_share."),
    _spec(
        "near_duplicates",
        "Share of near-duplicate rows (equal up to case, spaces and punctuation) is at most "
        "checks.max_near_duplicate_share. Warns only.",
        blocking=False,
    ),
    _spec("leakage", "Share of rows whose instruction contains their response is at most checks.max_leakage_share."),
    _spec("row_count", "Row count dropped by at most checks.max_row_fall since the last good version."),
    _spec(
        "drift",
        "Categories and lengths are distributed as in the last good version, within checks.max_drift. Warns only.",
        blocking=False,
    ),
]
BLOCKING = {spec.name for spec in SPECS if spec.blocking}


@dataclass(frozen=True)
class Profile:
    """What two versions are compared by."""

    rows: int
    categories: dict[str, int]
    lengths: dict[str, int]

    @staticmethod
    def of(statistics: dict[str, Any]) -> "Profile":
        most = dict(list(statistics["categories"].items())[:CATEGORIES])
        return Profile(statistics["rows"], most, statistics["quality"]["lengths"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def last_good(instance: dg.DagsterInstance, version: str, source: str) -> Profile | None:
    """The newest other version whose blocking checks passed; None on an instance that has seen none.

    What another source held says nothing of this one; another revision of a Hub dataset is of the same source.
    """
    found = instance.fetch_materializations(dg.AssetKey("dolly_raw"), limit=LOOKED_BACK)
    for record in found.records:
        made = record.asset_materialization
        tags = (made.tags if made else None) or {}
        if not made or PROFILE not in made.metadata or _place(str(made.metadata["source"].value)) != _place(source):
            continue
        if GOOD_TAG in tags and tags.get(DATA_VERSION_TAG) != version:
            return Profile(**made.metadata[PROFILE].value)  # type: ignore[arg-type]
    return None


def _place(source: str) -> str:
    return source.partition("@")[0] if source.startswith("hf://") else source


def raw_checks(
    context: dg.AssetExecutionContext, statistics: dict[str, Any], config: RawDataConfig, before: Profile | None
) -> list[dg.AssetCheckResult]:
    """The results of all SPECS.

    Args:
        context: Of the asset; a failure is told in its log.
        statistics: Of this version.
        config: What is let pass.
        before: The last good version.
    """
    now = Profile.of(statistics)
    return [
        _schema(context, statistics["files_without_rows"]),
        _quarantine(context, statistics, config.max_quarantine_share),
        *_repeats(context, statistics, config.checks),
        _leakage(context, statistics, config.checks.max_leakage_share),
        _row_count(context, now, before, config.checks.max_row_fall),
        _drift(now, before, config.checks.max_drift),
    ]


def _schema(context: dg.AssetExecutionContext, files: list[str]) -> dg.AssetCheckResult:
    told = (
        f"No valid rows in {', '.join(files[:5])}; see the check quarantine for reasons"
        if files
        else "All files have valid rows"
    )
    if files:
        context.log.error(f"Check schema failed: {told}")
    return dg.AssetCheckResult(passed=not files, check_name="schema", description=told, metadata={"files": len(files)})


def _quarantine(context: dg.AssetExecutionContext, statistics: dict[str, Any], most: float) -> dg.AssetCheckResult:
    from finetune_assets.data.tables import rows_table

    first = statistics["first_quarantined"]
    told = "{file}:{line}: {reason}".format(**first[0]) if first else ""
    reasons = [{"reason": reason, "rows": rows} for reason, rows in statistics["reasons"].items()]
    return fraction_check(
        context,
        "quarantine",
        statistics["quarantined"],
        statistics["rows"] + statistics["quarantined"],
        most,
        f"quarantined (max_quarantine_share = {most:g}). First: {told}",
        reasons=dg.MetadataValue.md(rows_table(reasons, ["rows", "reason"])),
        first_rows=dg.MetadataValue.md(rows_table(first, ["file", "line", "reason", "text"])),
    )


def _repeats(
    context: dg.AssetExecutionContext, statistics: dict[str, Any], allowed: RawChecks
) -> list[dg.AssetCheckResult]:
    quality, results = statistics["quality"], []
    for name, most, severity, how in (
        ("duplicates", allowed.max_duplicate_share, dg.AssetCheckSeverity.ERROR, ""),
        (
            "near_duplicates",
            allowed.max_near_duplicate_share,
            dg.AssetCheckSeverity.WARN,
            " but for case, spaces and punctuation",
        ),
    ):
        pairs = quality[f"first_{name}"]
        first = "row {} repeats row {}".format(*pairs[0]) if pairs else ""
        setting = f"checks.max_{name.removesuffix('s')}_share"
        problem = f"repeat another row{how} ({setting} = {most:g}). First: {first}"
        shown = _rows(statistics, [row for row, _ in pairs], ["repeats"], [[f"row {other}"] for _, other in pairs])
        results.append(
            fraction_check(
                context, name, quality[name], statistics["rows"], most, problem, severity=severity, first_rows=shown
            )
        )
    return results


def _leakage(context: dg.AssetExecutionContext, statistics: dict[str, Any], most: float) -> dg.AssetCheckResult:
    rows = statistics["quality"]["first_leaked"]
    problem = (
        f"contain their response in their instruction (checks.max_leakage_share = {most:g}). First: row {rows[:1]}"
    )
    shown = _rows(statistics, rows)
    return fraction_check(
        context, "leakage", statistics["quality"]["leaked"], statistics["rows"], most, problem, first_rows=shown
    )


def _rows(
    statistics: dict[str, Any], numbers: list[int], more: list[str] | None = None, cells: list[list[str]] | None = None
) -> dg.MarkdownMetadataValue:
    from finetune_assets.data.tables import rows_table

    more, cells = more or [], cells or [[]] * len(numbers)
    rows = [
        {"row": number, **statistics["shown"][str(number)], **dict(zip(more, own, strict=True))}
        for number, own in zip(numbers, cells, strict=True)
    ]
    return dg.MetadataValue.md(rows_table(rows, ["row", *more, "instruction", "context", "response", "category"]))


def _row_count(
    context: dg.AssetExecutionContext, now: Profile, before: Profile | None, most: float
) -> dg.AssetCheckResult:
    rows = before.rows if before else now.rows
    fall = max(0.0, 1 - now.rows / rows) if rows else 0.0
    told = (
        f"{now.rows:,} rows; the last good version had {rows:,}"
        if before
        else f"{now.rows:,} rows in the first version"
    )
    if fall > most:
        told += f". Row count dropped by {fall:.0%} (checks.max_row_fall = {most:g})"
        context.log.error(f"Check row_count failed: {told}")
    metadata = {"rows": now.rows, "rows_before": rows, "row_drop_fraction": fall, "threshold": most}
    return dg.AssetCheckResult(passed=fall <= most, check_name="row_count", description=told, metadata=metadata)


def _drift(now: Profile, before: Profile | None, most: float) -> dg.AssetCheckResult:
    from finetune_assets.data.quality import distance

    by = {
        "categories": distance(now.categories, before.categories) if before else 0.0,
        "lengths": distance(now.lengths, before.lengths) if before else 0.0,
    }
    farthest = max(by, key=lambda name: by[name])
    told = (
        f"Largest distance: {farthest}, {by[farthest]:.3f} (checks.max_drift = {most:g})"
        if before
        else "First version: no version to compare with"
    )
    return dg.AssetCheckResult(
        passed=by[farthest] <= most,
        check_name="drift",
        severity=dg.AssetCheckSeverity.WARN,
        description=told,
        metadata={**{f"{name}_distance": value for name, value in by.items()}, "threshold": most},
    )
