"""The raw data that all experiments share: its sources, and the version of each."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_assets.artifacts import provenance
from finetune_assets.artifacts.aliases import canonical
from finetune_assets.artifacts.kinds import RAW
from finetune_assets.artifacts.streams import is_good, newest_version
from finetune_assets.config.errors import suggest
from finetune_assets.config.fingerprint import fingerprint, identity
from finetune_assets.config.loading import Experiment
from finetune_assets.config.raw_data_schema import PACKAGED_ROWS, Columns, HubDataset, RawDataConfig, RawSource
from finetune_assets.data.errors import DataError, Unreachable
from finetune_assets.errors import UserError
from finetune_assets.sources.local import count_rows
from finetune_assets.sources.names import UNNAMED, source_name
from finetune_assets.sources.pins import Pins
from finetune_assets.sources.raw_data import open_source
from finetune_assets.sources.source import Source, SourceContext
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore
from finetune_assets.store.errors import ArtifactMissing

NO_GOOD_VERSION = "none"
"""In place of a version of the raw data: none of the sources has passed its blocking checks."""
PARTS = "parts"
"""Provenance key of raw data of several sources: fingerprint of each source's version, by name."""


class SourceLineage:
    """One source of raw data.

    Args:
        name: Name of the source in the settings.
        config: The deployment's raw data settings, with `source`, `columns` and `hub` of this source.
        context: What sources are opened with, except the settings.
        several: Whether there are other sources, so that errors name this one.
    """

    def __init__(self, name: str, config: RawDataConfig, context: SourceContext, several: bool = False) -> None:
        self.name, self.config, self.context, self.several = name, config, replace(context, config=config), several

    @property
    def source_name(self) -> str:
        """Where the rows come from, equal for all versions."""
        return source_name(self.config.source, self.context.root)

    @property
    def stream(self) -> str:
        """Identifies the history of the source: where and how its rows are read."""
        config = self.config
        part = {"columns": identity(config.columns), "hub": asdict(config.hub), "source": config.source}
        default = {"columns": identity(Columns()), "hub": asdict(HubDataset()), "source": config.source}
        whole = part == default and "@" not in config.source
        return self.source_name if whole else f"{self.source_name} {fingerprint(**part)}"

    @cached_property
    def source(self) -> Source:
        with self._named():
            return open_source(self.context)

    def is_unchanged(self) -> bool:
        """Whether the files have not changed since they were first read; a commit never changes."""
        again = self.source if self.source.is_pinned else open_source(self.context)
        return bool(again.content() == self.content)

    @cached_property
    def content(self) -> Any:
        """Identity of the source's bytes; cached, because it requires reading all files."""
        with self._named():
            return self.source.content()

    @cached_property
    def fingerprint(self) -> str:
        return RAW.fingerprint(self.config, content=self.content)

    def earlier_fingerprints(self) -> list[str]:
        """Fingerprints of the same bytes under earlier code versions."""
        return RAW.earlier_fingerprints(self.config, content=self.content)

    def peek(self) -> str:
        """Changes whenever the raw data, or its checks' thresholds, may have changed; reads no file contents."""
        with self._named():
            return fingerprint(settings=self._settings, glance=self.source.peek())

    def version(self) -> str:
        """Changes if and only if the raw data, or its checks' thresholds, change; reads only new files."""
        with self._named():
            return fingerprint(settings=self._settings, content=self.source.cached_content())

    def rows(self) -> int:
        """Number of rows of the source, good and bad; reads only new files."""
        with self._named():
            return sum(count_rows(file) for file in self.source.files())

    @property
    def _settings(self) -> Any:
        config = self.config
        allowed = [config.max_quarantine_share, asdict(config.checks)]
        return {"columns": identity(config.columns), "allowed": allowed}

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the source in errors, if there are several."""
        try:
            yield
        except DataError as e:
            where = f"sources.{self.name}: "
            if not self.several or str(e).startswith(where):
                raise
            error = Unreachable if e.retriable else DataError
            raise error(f"{where}{e}") from e


class RawLineage:
    """The raw data, which all experiments share.

    Args:
        store: Store of the artifacts.
        config: The deployment's raw data settings.
        root: Folder that relative paths in settings start from.
        asks_hub: Resolve a branch on the Hub; otherwise use the recorded commit.
        version: Fingerprint of the raw data, or `NO_GOOD_VERSION`; computed by reading the sources if not given.
        connect: Creates the boto3 client, for a source on S3.
        configs: Folder of the configuration files; by default `configs` in `root`.
    """

    def __init__(
        self,
        store: ArtifactStore,
        config: RawDataConfig,
        root: Path,
        asks_hub: bool = False,
        version: str | None = None,
        connect: Callable[[], Any] | None = None,
        configs: Path | None = None,
    ) -> None:
        self.store, self.config, self.root, self.given = store, config, root, version
        self.connect, self.configs = connect, configs or root / "configs"
        self.pins = Pins(store, "dataset", made_by="dolly_raw", asks_hub=asks_hub)
        context = SourceContext(config, root, self.pins.commit_of, connect, store.cache.root / "downloads")
        named = config.sources or {name_of_single(config): RawSource(config.source, config.columns, config.hub)}
        self.sources = {
            name: SourceLineage(
                name,
                replace(config, source=part.source, columns=part.columns, hub=part.hub, sources={}),
                context,
                several=bool(config.sources),
            )
            for name, part in named.items()
        }

    @property
    def source_name(self) -> str:
        """Names of all sources as text, equal for all versions."""
        return all_sources(self.config, self.root)

    @cached_property
    def fingerprint(self) -> str:
        if self.given == NO_GOOD_VERSION:
            raise ArtifactMissing(
                f"no version of {self.source_name} has passed its blocking checks; materialize dolly_raw"
            )
        if self.given or len(self.sources) == 1:
            return self.given or self.known(next(iter(self.sources.values())))
        return combined(self.current_parts())

    def current_parts(self) -> dict[str, str]:
        """Fingerprint of each source's version, by name.

        A source that cannot be read, or whose version failed its blocking checks, has its last good version, and is
        left out if it has none. If none is good, each has its own version.

        Raises:
            UserError: if no source is left.
        """
        parts, bad, errors = {}, {}, []
        for name, source in self.sources.items():
            try:
                version = self.known(source)
            except UserError as e:  # also a Hub dataset whose commit is not recorded yet
                errors.append(e)
            else:
                if not self._is_bad(source, version):
                    parts[name] = version
                    continue
                bad[name] = version
            if last := newest_version(self.store, source.stream):
                parts[name] = last.fingerprint
        if not parts and not bad:
            raise errors[0]
        return parts or bad

    def _is_bad(self, source: SourceLineage, version: str) -> bool:
        """Whether a version was read and has not passed its blocking checks."""
        is_read = self.store.find(RAW.folder, version) is not None
        return is_read and not is_good(self.store, source.stream, version)

    def known(self, source: SourceLineage) -> str:
        """Fingerprint of a source's version: of an earlier code version's artifact, if it has exactly the same rows."""
        ref = self.store.find(RAW.folder, source.fingerprint)
        return canonical(self.store, ref).fingerprint if ref else source.fingerprint

    def raw(self) -> ArtifactRef:
        return self.store.resolve(RAW.folder, self.fingerprint, made_by="dolly_raw")

    def parts(self, raw: ArtifactRef) -> dict[str, str]:
        """Fingerprint of each source's version in a version of the raw data, by name."""
        manifest = self.store.manifest(raw.kind, raw.name)
        if parts := provenance.texts_by_name(manifest.made_from if manifest else {}, PARTS):
            return parts
        if len(self.sources) == 1:
            return {name_of_single(self.config): raw.fingerprint}
        return {name: part for name, part in self.current_parts().items() if part == raw.fingerprint}


def refuse_missing_sources(experiment: Experiment, config: RawDataConfig) -> None:
    """Compare the sources that an experiment selects with those that are configured; reads none of them.

    Raises:
        ArtifactMissing: if a selected source is not configured. An experiment of packaged rows is never trained on
            others.
    """
    configured = [*config.sources] or [name_of_single(config)]
    for name in experiment.config.data.sources or ():
        if name in configured:
            continue
        problem = f"experiment {experiment.name}: data.sources names '{name}'"
        if name in PACKAGED_ROWS:
            raise ArtifactMissing(
                f"{problem}, the packaged rows, but raw_data.yaml names {', '.join(configured)}; run it with "
                f"FINETUNE_RAW_DATA={name} in the environment, or add `{name}: {{source: {name}}}` to `sources`"
            )
        where = "raw_data.yaml (or FINETUNE_RAW_DATA)"
        raise ArtifactMissing(f"{problem}, but {where} names {', '.join(configured)}; {suggest(name, configured)}")


def combined(parts: Mapping[str, str]) -> str:
    """Fingerprint of raw data of several sources.

    Args:
        parts: Fingerprint of each source's version, by name.
    """
    return fingerprint(code=RAW.code_version, parts=dict(parts))


def name_of_single(config: RawDataConfig) -> str:
    """Name of the source where there is only one."""
    if config.sources:
        return next(iter(config.sources))
    return config.source if config.source in PACKAGED_ROWS else UNNAMED


def all_sources(config: RawDataConfig, root: Path) -> str:
    """Where the rows of a deployment come from, as text that is equal for all versions."""
    return ", ".join(sorted({source_name(part.source, root) for part in config.sources.values()})) or source_name(
        config.source, root
    )
