"""Checks of the files: valid rows in each, and few invalid ones."""

import dagster as dg

from finetune_assets.assets.materialization import fraction_check
from finetune_assets.assets.raw_checks.check import RawCheck, Version
from finetune_assets.display import message

FILES = 3
"""Maximum number of files that the message names."""


def _schema(version: Version) -> dg.AssetCheckResult:
    files = version.statistics["files_without_rows"]
    text = (
        message(f"No valid rows in {', '.join(files[:5])}; see the check quarantine for reasons")
        if files
        else "All files have valid rows"
    )
    if files:
        version.context.log.error(f"Check schema failed: {text}")
    return dg.AssetCheckResult(passed=not files, check_name="schema", description=text, metadata={"files": len(files)})


def _quarantine(version: Version) -> dg.AssetCheckResult:
    from finetune_assets.data.tables import rows_table

    statistics, most = version.statistics, version.config.max_quarantine_share
    first, by_file = statistics["first_quarantined"], statistics["quarantined_by_file"]
    first_reason = "{file}:{line}: {reason}".format(**first[0]) if first else ""
    worst = ", ".join(f"{file} {bad:,} of {rows:,}" for file, (bad, rows) in [*by_file.items()][:FILES])
    by_file_text = f" By file: {worst}." if len(by_file) > 1 else ""
    files = [{"file": file, "quarantined": bad, "rows": rows} for file, (bad, rows) in by_file.items()]
    reasons = [{"reason": reason, "rows": rows} for reason, rows in statistics["reasons"].items()]
    return fraction_check(
        version.context,
        "quarantine",
        statistics["quarantined"],
        statistics["rows"] + statistics["quarantined"],
        most,
        f"quarantined (max_quarantine_share = {most:g}).{by_file_text} First: {first_reason}",
        reasons=dg.MetadataValue.md(rows_table(reasons, ["rows", "reason"])),
        files=dg.MetadataValue.md(rows_table(files, ["file", "quarantined", "rows"])),
        first_rows=dg.MetadataValue.md(rows_table(first, ["file", "line", "reason", "text"])),
    )


SCHEMA = RawCheck(
    "schema", "Each file has valid rows. A file without any has other columns or another format.", _schema
)
QUARANTINE = RawCheck(
    "quarantine", "Share of invalid rows is at most max_quarantine_share (configs/raw_data.yaml).", _quarantine
)
