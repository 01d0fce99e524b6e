"""Checks of the rows: duplicates, near-duplicates, and responses in instructions."""

import dagster as dg

from finetune_assets.assets.materialization import fraction_check
from finetune_assets.assets.raw_checks.check import RawCheck, Version, rows_metadata


def _duplicates(version: Version) -> dg.AssetCheckResult:
    return _repeated(version, "duplicates", version.config.checks.max_duplicate_share)


def _near_duplicates(version: Version) -> dg.AssetCheckResult:
    most, threshold = version.config.checks.max_near_duplicate_share, _threshold(version)
    how = " up to case, spaces and punctuation" if threshold is None else f" with a similarity of {threshold:g} or more"
    return _repeated(version, "near_duplicates", most, how, dg.AssetCheckSeverity.WARN)


def _threshold(version: Version) -> float | None:
    threshold: float | None = version.statistics["quality"].get("near_duplicate_threshold")
    return threshold


def _repeated(
    version: Version,
    name: str,
    most: float,
    how: str = "",
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
) -> dg.AssetCheckResult:
    statistics, quality = version.statistics, version.statistics["quality"]
    pairs = quality[f"first_{name}"]
    first = "row {} repeats row {}".format(*pairs[0]) if pairs else ""
    setting = f"checks.max_{name.removesuffix('s')}_share"
    problem = f"repeat another row{how} ({setting} = {most:g}). First: {first}"
    numbers, cells = [row for row, _ in pairs], [[f"row {other}"] for _, other in pairs]
    shown = rows_metadata(statistics, numbers, ["repeats"], cells)
    return fraction_check(
        version.context, name, quality[name], statistics["rows"], most, problem, severity=severity, first_rows=shown
    )


def _leakage(version: Version) -> dg.AssetCheckResult:
    statistics, most = version.statistics, version.config.checks.max_leakage_share
    rows = statistics["quality"]["first_leaked"]
    problem = (
        f"contain their response in their instruction (checks.max_leakage_share = {most:g}). First: row {rows[:1]}"
    )
    shown, leaked = rows_metadata(statistics, rows), statistics["quality"]["leaked"]
    return fraction_check(version.context, "leakage", leaked, statistics["rows"], most, problem, first_rows=shown)


DUPLICATES = RawCheck("duplicates", "Share of exact duplicate rows is at most checks.max_duplicate_share.", _duplicates)
NEAR_DUPLICATES = RawCheck(
    "near_duplicates",
    "Share of near-duplicate rows (similarity of at least 0.8 by MinHash; see checks.near_duplicates) that are not "
    "exact duplicates is at most checks.max_near_duplicate_share. Warns only.",
    _near_duplicates,
    blocking=False,
)
LEAKAGE = RawCheck(
    "leakage", "Share of rows with the response in the instruction is at most checks.max_leakage_share.", _leakage
)
