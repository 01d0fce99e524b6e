"""Checks of the files: valid rows in each, and few invalid ones."""

import dagster as dg

from finetune_assets.assets.materialization import fraction_check
from finetune_assets.assets.raw_checks.check import RawCheck, Version


def _schema(version: Version) -> dg.AssetCheckResult:
    files = version.statistics["files_without_rows"]
    message = (
        f"No valid rows in {', '.join(files[:5])}; see the check quarantine for reasons"
        if files
        else "All files have valid rows"
    )
    if files:
        version.context.log.error(f"Check schema failed: {message}")
    return dg.AssetCheckResult(
        passed=not files, check_name="schema", description=message, metadata={"files": len(files)}
    )


def _quarantine(version: Version) -> dg.AssetCheckResult:
    from finetune_assets.data.tables import rows_table

    statistics, most = version.statistics, version.config.max_quarantine_share
    first = statistics["first_quarantined"]
    first_reason = "{file}:{line}: {reason}".format(**first[0]) if first else ""
    reasons = [{"reason": reason, "rows": rows} for reason, rows in statistics["reasons"].items()]
    return fraction_check(
        version.context,
        "quarantine",
        statistics["quarantined"],
        statistics["rows"] + statistics["quarantined"],
        most,
        f"quarantined (max_quarantine_share = {most:g}). First: {first_reason}",
        reasons=dg.MetadataValue.md(rows_table(reasons, ["rows", "reason"])),
        first_rows=dg.MetadataValue.md(rows_table(first, ["file", "line", "reason", "text"])),
    )


SCHEMA = RawCheck(
    "schema", "Each file has valid rows. A file without any has other columns or another format.", _schema
)
QUARANTINE = RawCheck(
    "quarantine", "Share of invalid rows is at most max_quarantine_share (configs/raw_data.yaml).", _quarantine
)
