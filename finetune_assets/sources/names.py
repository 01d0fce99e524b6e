"""Names of raw data sources, by which versions of one source are recognized."""

import os
from pathlib import Path

from finetune_assets.config.raw_data_schema import PACKAGED_ROWS

SAMPLE, SAMPLE_TOWNS, UNNAMED = *PACKAGED_ROWS, "default"
"""Names of a single source: the packaged rows, the packaged rows about the packaged documents, and any other."""


def source_name(setting: str, root: Path) -> str:
    """Name of the source that a setting describes: equal for all versions and spellings of one source.

    Args:
        setting: The setting `source`.
        root: Project folder, to which a relative path is resolved.

    Returns:
        `sample` or `sample-towns`; a URL without the revision of a Hub dataset and without a slash at its end; or a
        path, relative to the project if it is inside.
    """
    if setting in PACKAGED_ROWS:
        return setting
    if "://" in setting:
        return (setting.partition("@")[0] if setting.startswith("hf://") else setting).rstrip("/")
    path = Path(os.path.normpath(root / Path(setting).expanduser()))  # not `resolve`: a link may point elsewhere later
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
