"""Check of the rows: secrets and personal data."""

import dagster as dg

from finetune_assets.assets.materialization import fraction_check
from finetune_assets.assets.raw_checks.check import RawCheck, Version


def _sensitive(version: Version) -> dg.AssetCheckResult:
    from finetune_assets.data.tables import rows_table

    sensitive, most = version.statistics["sensitive"], version.config.checks.max_sensitive_share
    kinds = [{"kind": kind, "findings": findings} for kind, findings in sensitive["findings"].items()]
    counts = ", ".join(f"{kind}: {findings:,}" for kind, findings in sensitive["findings"].items())
    first = min(sensitive["first"], key=lambda finding: finding["row"], default=None)
    where = "row {row} of those read, from 0, {field}: {shown} ({kind})".format(**first) if first else ""
    return fraction_check(
        version.context,
        "sensitive",
        sensitive["rows"],
        version.statistics["rows"],
        most,
        f"contain a secret or personal data (checks.max_sensitive_share = {most:g}): {counts}. First: {where}. "
        "The rows are kept unchanged; replace the values in the source, or raise the threshold",
        severity=dg.AssetCheckSeverity.WARN,
        kinds=dg.MetadataValue.md(rows_table(kinds, ["kind", "findings"])),
        first_findings=dg.MetadataValue.md(rows_table(sensitive["first"], ["kind", "row", "field", "shown"])),
        examples=sensitive["examples"],
    )


SENSITIVE = RawCheck(
    "sensitive",
    "Share of rows with a secret (keys, tokens, passwords) or personal data (e-mail addresses, payment cards, IBANs, "
    "phone numbers) is at most checks.max_sensitive_share. Warns only.",
    _sensitive,
    blocking=False,
)
