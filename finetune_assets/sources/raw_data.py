"""The registry of raw data sources. A source of your own is a file in this folder and an entry in SOURCES."""

from collections.abc import Callable

from finetune_assets.config.raw_data_schema import PACKAGED_ROWS
from finetune_assets.data.errors import DataError
from finetune_assets.display import shown_url
from finetune_assets.sources.hub_dataset import open_hub_dataset
from finetune_assets.sources.local import open_local, open_packaged
from finetune_assets.sources.s3 import open_s3
from finetune_assets.sources.source import Source, SourceContext

SOURCES: dict[str, Callable[[SourceContext], Source]] = {
    "hf://": open_hub_dataset,
    "s3://": open_s3,
}
"""How a source is opened, by the prefix of the setting `source`."""


def open_source(context: SourceContext) -> Source:
    """Resolve the setting `source`: packaged rows, a URL of a registered source, or a local path.

    Raises:
        DataError: if the source does not exist, or contains no supported file.
    """
    source = context.config.source
    if source in PACKAGED_ROWS:
        return open_packaged(context)
    for prefix, opened in SOURCES.items():
        if source.startswith(prefix):
            return opened(context)
    if "://" in source:
        raise DataError(
            f"source: '{shown_url(source)}': unsupported scheme; name a file, a folder, or a URL that begins with "
            f"{', '.join(SOURCES)}"
        )
    return open_local(context)
