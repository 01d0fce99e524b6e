"""A document set: where its documents come from, and the version of its index."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_assets.artifacts.kinds import INDEXES, RAW
from finetune_assets.artifacts.raw_lineage import RawLineage
from finetune_assets.config.documents_schema import DocumentsConfig
from finetune_assets.config.fingerprint import fingerprint, identity
from finetune_assets.config.raw_data_schema import RawDataConfig
from finetune_assets.data.errors import DataError
from finetune_assets.data.readers import DOCUMENT_FORMATS
from finetune_assets.sources.names import SAMPLE, source_name
from finetune_assets.sources.pins import Pins
from finetune_assets.sources.raw_data import open_source
from finetune_assets.sources.source import Source, SourceContext
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.errors import ArtifactMissing
from finetune_assets.store.hashing import folder_hashes

SAMPLE_DOCUMENTS = Path(__file__).parent.parent / "sample" / "documents"
CONTEXTS = "contexts"
"""Source of passages that are contexts of the raw data."""
NO_GOOD_INDEX = "none"
"""In place of a version of the index: none of the document set's has passed its blocking checks."""


class DocumentLineage:
    """One document set. Errors name it.

    Args:
        name: Name of the set.
        config: Its settings.
        raw: The raw data, whose contexts may be the documents.
        asks_hub: Resolve a branch on the Hub; otherwise use the recorded commit.
        version: Fingerprint of the index, or `NO_GOOD_INDEX`; computed by reading the documents if not given.
    """

    def __init__(
        self, name: str, config: DocumentsConfig, raw: RawLineage, asks_hub: bool = False, version: str | None = None
    ) -> None:
        self.name, self.config, self.raw, self.given = name, config, raw, version
        self.pins = Pins(raw.store, "dataset", made_by="retrieval_index", asks_hub=asks_hub)

    @property
    def source_name(self) -> str:
        """Where the documents come from, equal for all versions."""
        return CONTEXTS if self.config.from_contexts else source_name(self.config.source or "", self.raw.root)

    @cached_property
    def source(self) -> Source:
        """The files of the documents.

        Raises:
            DataError: if the source does not exist, or contains no supported file.
        """
        return self._opened()

    def _opened(self) -> Source:
        setting = str(SAMPLE_DOCUMENTS) if self.config.source == SAMPLE else self.config.source or ""
        context = SourceContext(
            RawDataConfig(source=setting, hub=self.config.hub),
            self.raw.root,
            self.pins.commit_of,
            self.raw.connect,
            self.raw.store.cache.root / "downloads",
            DOCUMENT_FORMATS,
            f"`source` in documents/{self.name}.yaml",
        )
        try:
            return open_source(context)
        except DataError as e:
            raise type(e)(f"document set {self.name}: {e}") from e

    @cached_property
    def content(self) -> Any:
        """Identity of the documents; cached, because it requires reading all new files."""
        return {"raw": self.raw.raw().fingerprint} if self.config.from_contexts else _named(self.source, cached=True)

    @property
    def short_content(self) -> Any:
        """What provenance names: the content, or a hash of it for files, of which there may be many."""
        is_short = self.config.from_contexts or self.source.is_pinned
        return self.content if is_short else {"files": len(self.content["files"]), "hash": fingerprint(of=self.content)}

    def is_unchanged(self) -> bool:
        """Whether the documents have not changed since they were first read."""
        if self.config.from_contexts or self.source.is_pinned:
            return True
        return bool(_named(self._opened(), cached=False) == self.content)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the index.

        Raises:
            ArtifactMissing: if no version of it is good.
        """
        if self.given == NO_GOOD_INDEX:
            raise ArtifactMissing(
                f"no index of the document set {self.name} has passed its blocking checks; materialize retrieval_index"
            )
        return self.given or INDEXES.fingerprint(self.config, content=self.content, model=self.model)

    def index(self) -> ArtifactRef:
        """The index.

        Raises:
            ArtifactMissing: if it is not in the store.
        """
        made_by = f"retrieval_index (an experiment that retrieves from {self.name})"
        return self.raw.store.resolve(INDEXES.folder, self.fingerprint, made_by=made_by)

    @property
    def model(self) -> Any:
        """Identity of a dense index's model: hashes of its folder, or its name and commit; None without one.

        Raises:
            DataError: if the model is neither a folder nor a name with a commit.
        """
        setting = self.config.index.model
        if setting is None:
            return None
        folder = self.raw.root / Path(setting).expanduser()
        if folder.is_dir():
            return folder_hashes(folder)
        if "@" in setting and not setting.startswith((".", "/", "~")):
            return setting
        raise DataError(
            f"document set {self.name}: index.model: '{setting}' is neither a folder ({folder}) nor owner/name@commit"
        )

    # ---- for the sensor

    def peek(self) -> str:
        """Changes whenever the documents may have changed; reads no file contents."""
        glance = self._raw_version() if self.config.from_contexts else self.source.peek()
        return fingerprint(settings=self._settings, glance=glance)

    def version(self) -> str:
        """Changes if and only if the index, or the thresholds of its checks, change; reads only new files."""
        return fingerprint(settings=self._settings, content=self.content, model=self.model)

    def rows(self) -> int:
        """Not counted: an index is rebuilt for a single document."""
        return 0

    def _raw_version(self) -> str:
        return self.raw.fingerprint

    @property
    def _settings(self) -> Any:
        return {"documents": identity(self.config), "checks": asdict(self.config.checks)}


def _named(source: Source, cached: bool) -> Any:
    """Identity of a source's files with their names, which passages name as their sources."""
    content = source.cached_content() if cached else source.content()
    return content if source.is_pinned else {"files": [file.name for file in source.files()], "content": content}


def contexts_of(raw: RawLineage) -> Iterator[str]:
    """Contexts of all rows of the raw data that have one, in the order of the rows."""
    for batch in _raw_rows(raw, ["context"]):
        yield from (context for context in batch["context"].to_pylist() if context)


def _raw_rows(raw: RawLineage, columns: list[str]) -> Iterator[Any]:
    from finetune_assets.data.ingest import PARQUET
    from finetune_assets.data.raw_files import raw_batches

    versions = (raw.store.resolve(RAW.folder, part, made_by="dolly_raw") for part in raw.parts(raw.raw()).values())
    files = [raw.store.fetch(ref, lambda path: path == PARQUET) / PARQUET for ref in versions]
    yield from (batch for _, batch in raw_batches(files, 10_000, columns))


def rows_with_context(raw: RawLineage) -> Iterator[tuple[str, str, str]]:
    """Instruction, context and category of all rows of the raw data that have a context and are no conversations."""
    for batch in _raw_rows(raw, ["instruction", "context", "category", "messages"]):
        for row in batch.to_pylist():
            if row["context"] and row["messages"] is None:
                yield row["instruction"], row["context"], row["category"]
