"""What a check of the raw data is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dagster as dg

from finetune_assets.assets.raw_checks.profile import Profile
from finetune_assets.config.raw_data_schema import RawDataConfig


@dataclass(frozen=True)
class Version:
    """A version of the raw data, to be checked.

    Attributes:
        context: Context of the asset step; failures are written to its log.
        statistics: Statistics of this version, as `data.ingest.Statistics` has them.
        config: Raw data settings with the thresholds of the checks.
        previous: Profile of the last good version, if any.
    """

    context: dg.AssetExecutionContext
    statistics: dict[str, Any]
    config: RawDataConfig
    previous: Profile | None

    @property
    def profile(self) -> Profile:
        return Profile.of(self.statistics)


@dataclass(frozen=True)
class RawCheck:
    """A check of `dolly_raw`.

    Attributes:
        name: Name of the check in Dagster.
        description: What passes, with the setting of the threshold.
        evaluate: Evaluates the check; its result has the check's name.
        blocking: Whether a failure stops the assets that use the data, also in automatic runs.
    """

    name: str
    description: str
    evaluate: Callable[[Version], dg.AssetCheckResult]
    blocking: bool = True

    @property
    def spec(self) -> dg.AssetCheckSpec:
        return dg.AssetCheckSpec(self.name, asset="dolly_raw", blocking=self.blocking, description=self.description)


def rows_metadata(
    statistics: dict[str, Any], numbers: list[int], more: list[str] | None = None, cells: list[list[str]] | None = None
) -> dg.MarkdownMetadataValue:
    """Rows of a version as a table.

    Args:
        statistics: Statistics of the version, in which these rows are shown.
        numbers: Numbers of the rows.
        more: Names of additional columns.
        cells: Cells of the additional columns, one list per row.
    """
    from finetune_assets.data.tables import rows_table

    more, cells = more or [], cells or [[]] * len(numbers)
    rows = [
        {"row": number, **statistics["shown"][str(number)], **dict(zip(more, own, strict=True))}
        for number, own in zip(numbers, cells, strict=True)
    ]
    return dg.MetadataValue.md(rows_table(rows, ["row", *more, "instruction", "context", "response", "category"]))
