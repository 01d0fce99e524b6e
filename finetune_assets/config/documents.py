"""Loads and validates document sets, `configs/documents/NAME.yaml`."""

import math
from collections.abc import Iterator
from pathlib import Path

from finetune_assets.config.documents_schema import INDEX_KINDS, DocumentsConfig
from finetune_assets.config.errors import ConfigError, suggest
from finetune_assets.config.loading import document_sets, load_file
from finetune_assets.config.raw_validation import Problem, address_problems, column_problems, named, shares

MOST_WORDS = 100_000
"""Maximum length of a passage, in words."""
MOST_K = 1000


def load_documents(configs: Path, name: str) -> DocumentsConfig:
    """Load the settings of a document set.

    Raises:
        ConfigError: naming the file, the setting, its value, and the valid options.
    """
    if name not in (known := document_sets(configs)):
        problem = f"no document set '{name}' here; {suggest(name, known)}" if known else f"no document set '{name}'"
        raise ConfigError(str(configs / "documents"), "", problem)
    path = configs / "documents" / f"{name}.yaml"
    config = load_file(DocumentsConfig, path)
    for key, problem in impossible_documents(config):
        raise ConfigError(str(path), key, problem)
    return config


def impossible_documents(config: DocumentsConfig) -> Iterator[Problem]:
    """All problems of the settings of a document set."""
    if config.from_contexts and config.source is not None:
        yield "source", f"'{config.source}' cannot be set together with from_contexts: true; remove one of them"
    elif not config.from_contexts and not (config.source or "").strip():
        yield "source", "must be set: name a file, a folder, a URL or `sample`; or set from_contexts: true"
    yield from address_problems("source", config.source)
    yield from column_problems("columns", config.columns)
    yield from _passages(config)
    yield from _index(config)
    checks = config.checks
    yield from shares({key: share for key, share in named("checks", checks).items() if isinstance(share, float)})
    if not 1 <= checks.k <= MOST_K:
        yield "checks.k", f"{checks.k} must be from 1 to {MOST_K:,}"
    for name in ("rows", "long_words"):
        if getattr(checks, name) < 1:
            yield f"checks.{name}", f"{getattr(checks, name)} must be at least 1"
    if not 0 <= config.quiet_seconds < math.inf:
        yield "quiet_seconds", f"{config.quiet_seconds} must be 0 or more"


def _passages(config: DocumentsConfig) -> Iterator[Problem]:
    size, overlap = config.passages.size, config.passages.overlap
    if not 1 <= size <= MOST_WORDS:
        yield "passages.size", f"{size} must be from 1 to {MOST_WORDS:,} words"
    elif not 0 <= overlap < size:
        yield "passages.overlap", f"{overlap} must be from 0 to below passages.size ({size})"


def _index(config: DocumentsConfig) -> Iterator[Problem]:
    index = config.index
    if index.kind not in INDEX_KINDS:
        yield "index.kind", f"'{index.kind}' is not a kind of index; {suggest(index.kind, INDEX_KINDS)}"
    if not 0 <= index.k1 <= 100:
        yield "index.k1", f"{index.k1} must be from 0 to 100"
    if not 0 <= index.b <= 1:
        yield "index.b", f"{index.b} must be from 0 to 1"
    if index.kind == "dense" and not (index.model or "").strip():
        yield "index.model", "must be set for index.kind: dense; name a folder, or owner/name@commit on the Hub"
    if index.kind == "bm25" and index.model is not None:
        yield "index.model", f"'{index.model}' is not used by index.kind: bm25; remove it, or use index.kind: dense"
