"""Checks against the last good version: the number of rows, and their distribution."""

import dagster as dg

from finetune_assets.assets.raw_checks.check import RawCheck, Version


def _row_count(version: Version) -> dg.AssetCheckResult:
    now, before, most = version.profile, version.previous, version.config.checks.max_row_fall
    rows = before.rows if before else now.rows
    fall = max(0.0, 1 - now.rows / rows) if rows else 0.0
    message = (
        f"{now.rows:,} rows; the last good version had {rows:,}"
        if before
        else f"{now.rows:,} rows in the first version"
    )
    if fall > most:
        message += f". Row count dropped by {fall:.0%} (checks.max_row_fall = {most:g})"
        version.context.log.error(f"Check row_count failed: {message}")
    metadata = {"rows": now.rows, "rows_before": rows, "row_drop_fraction": fall, "threshold": most}
    return dg.AssetCheckResult(passed=fall <= most, check_name="row_count", description=message, metadata=metadata)


def _drift(version: Version) -> dg.AssetCheckResult:
    from finetune_assets.data.quality import distance

    now, before, most = version.profile, version.previous, version.config.checks.max_drift
    by = {
        "categories": distance(now.categories, before.categories) if before else 0.0,
        "lengths": distance(now.lengths, before.lengths) if before else 0.0,
    }
    farthest = max(by, key=lambda name: by[name])
    message = (
        f"Largest distance: {farthest}, {by[farthest]:.3f} (checks.max_drift = {most:g})"
        if before
        else "First version: no version to compare with"
    )
    return dg.AssetCheckResult(
        passed=by[farthest] <= most,
        check_name="drift",
        severity=dg.AssetCheckSeverity.WARN,
        description=message,
        metadata={**{f"{name}_distance": value for name, value in by.items()}, "threshold": most},
    )


ROW_COUNT = RawCheck(
    "row_count", "Row count dropped by at most checks.max_row_fall since the last good version.", _row_count
)
DRIFT = RawCheck(
    "drift",
    "Categories and lengths are distributed as in the last good version, within checks.max_drift. Warns only.",
    _drift,
    blocking=False,
)
