"""Documents become passages, each content once, in bounded memory; bad documents give one clear error each."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_assets.config.documents import impossible_documents, load_documents, load_file
from finetune_assets.config.documents_schema import DocumentColumns, DocumentsConfig, PassageSettings
from finetune_assets.config.errors import ConfigError
from finetune_assets.data.errors import DataError
from finetune_assets.data.readers import SourceFile
from finetune_assets.retrieval import documents as reading
from finetune_assets.retrieval.documents import Document, read_documents
from finetune_assets.retrieval.golden import golden_passages
from finetune_assets.retrieval.passages import PASSAGES, Passages, PassageStatistics, passage_id, write_passages
from finetune_assets.retrieval.splitting import split_document, split_text

PARAGRAPHS, BY_WORDS = PassageSettings(), PassageSettings("tokens", size=4, overlap=1)


def files(folder: Path, **texts: str | bytes) -> list[SourceFile]:
    """Files by name, in which `__` stands for the dot."""
    written = []
    for name, text in texts.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        written.append(SourceFile(path.name, path))
    return written


def read(sources: list[SourceFile], columns: DocumentColumns | None = None) -> list[Document]:
    return [*read_documents(sources, columns or DocumentColumns())]


def passages_of(
    folder: Path, *documents: Document, settings: PassageSettings = PARAGRAPHS
) -> tuple[Passages, PassageStatistics]:
    folder.mkdir(parents=True, exist_ok=True)
    statistics = write_passages(documents, settings, folder)
    return Passages(folder, settings), statistics


def test_every_format_gives_the_same_document(tmp_path: Path) -> None:
    row = {"id": 7, "title": "A  title", "text": "One.\n\nTwo."}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    sources = files(tmp_path, j__jsonl=json.dumps(row), a__json=json.dumps([row]), t__txt="\ufeffOne.\r\n\r\nTwo.")
    sources += files(tmp_path, z__txt__gz=gzip.compress(b"One.\n\nTwo."), m__md="# A title\nOne.\n\nTwo.\n")
    sources.append(SourceFile("p.parquet", tmp_path / "p.parquet"))
    split = [[*split_document(document, PARAGRAPHS)] for document in read(sources)]
    assert split[0] == split[1] == split[4] == split[5] == [("One.", "A title"), ("Two.", "A title")]
    assert split[2] == split[3] == [("One.", ""), ("Two.", "")]
    assert [document.source for document in read(sources)][:3] == ["j.jsonl#7", "a.json#7", "t.txt"]


def test_splitting() -> None:
    assert split_text("a b c d e f g h", BY_WORDS) == ["a b c d", "d e f g", "g h"]
    assert split_text("a b, c d.\n\n e", PARAGRAPHS) == ["a b, c d.", "e"]
    assert split_text(" a b c d e ", PassageSettings("document", size=1, overlap=0)) == ["a b c d e"]
    assert split_text("a b c d e", PassageSettings("paragraph", size=4, overlap=1)) == ["a b c d", "d e"]
    assert split_text("東京都は日本", BY_WORDS) == ["東京都は", "は日本"], "no spaces: each character is a word"
    assert split_text("--- \n\n ", BY_WORDS) == ["---"]
    assert split_text(" \n\n\t", PARAGRAPHS) == []
    covered = split_text("w " * 1000, PassageSettings("tokens", size=7, overlap=3))
    assert sum(len(text.split()) for text in covered) - 3 * (len(covered) - 1) == 1000, (
        "each word once, but for overlaps"
    )


def test_markdown() -> None:
    text = (
        "---\ntitle: 'Front'\n---\nBefore.\n\n# One #\n\nUnder one.\n```sh\n# no heading\n\nls\n```\n## Two\nUnder two."
    )
    found = [*split_document(Document(text, "x.md", markdown=True), PARAGRAPHS)]
    assert found == [
        ("Before.", "Front"),
        ("Under one.\n```sh\n# no heading\n\nls\n```", "One"),
        ("Under two.", "Two"),
    ]
    ((whole, title),) = split_document(Document("# T\nText", "x.md", markdown=True), PassageSettings("document"))
    assert (whole, title) == ("# T\nText", "T")


def test_each_content_once_and_counted(tmp_path: Path) -> None:
    texts = {"a": "One.\n\nTwo.", "b": " ONE. ", "empty": " \n", "a again": "One.\n\nTwo.", "c": "Three. \n\ntwo."}
    passages, statistics = passages_of(tmp_path, *(Document(text, name) for name, text in texts.items()))
    assert [*passages.texts] == ["One.", "Two.", "Three."]
    assert passages.table.schema.equals(PASSAGES)
    assert passages.table["position"].to_pylist() == [0, 1, 0]
    assert [*passages.words] == [1, 1, 1]
    assert passages.ids[0] == passage_id("  one.") == passage_id("ONE.")
    counts = (statistics.documents, statistics.passages, statistics.empty_documents, statistics.duplicate_documents)
    assert counts == (5, 3, 1, 2)
    assert (statistics.first_empty, statistics.first_duplicates) == (["empty"], ["b", "a again"])
    assert statistics.duplicate_passages == 4


def test_golden_passages_of_a_context(tmp_path: Path) -> None:
    passages, _ = passages_of(tmp_path, Document("One is here.\n\nTwo is there.\n\nThree.", "a"))
    assert golden_passages(passages, "two IS  there.") == [1]
    assert golden_passages(passages, "Three.\n\nOne is here.\n\nGone.") == [2, 0], "in the order of the context"
    assert golden_passages(passages, "Gone.") == golden_passages(passages, " ") == []


def test_a_long_text_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PART_CHARACTERS", 1_000)
    paragraphs = [f"Paragraph {number} has words." for number in range(500)]
    (source,) = files(tmp_path, long__md="# Title\n" + "\n\n".join(paragraphs))
    parts = read([source])
    assert len(parts) > 10
    assert max(len(part.text) for part in parts) <= 2_000
    passages, statistics = passages_of(tmp_path / "out", *parts)
    assert [*passages.texts] == paragraphs
    assert {*passages.titles} == {"Title"}
    assert passages.table["position"].to_pylist() == [*range(500)]
    assert statistics.documents == 1
    with pytest.raises(DataError, match=r"long\.md"):
        passages_of(tmp_path / "whole", *parts, settings=PassageSettings("document"))


ROW = {"text": "A text."}
BAD_FILES: dict[str, tuple[str, bytes, DocumentColumns, str]] = {
    "no column of text": ("a.jsonl", b'{"words": "x"}', DocumentColumns(), "a.jsonl:1"),
    "two columns of text": ("a.jsonl", b'{"text": "x", "content": "y"}', DocumentColumns(), "columns.text"),
    "a column that is not there": ("a.jsonl", b'{"text": "x"}', DocumentColumns(text="txt"), "'text'"),
    "a text that is a number": ("a.jsonl", b'{"text": "x"}\n{"text": 3}', DocumentColumns(), "a.jsonl:2"),
    "a row that is a list": ("a.jsonl", b"[1]\n", DocumentColumns(), "a.jsonl:1"),
    "a row that is cut": ("a.jsonl", b'{"text": "x"}\n{"text": "y', DocumentColumns(), "a.jsonl:2"),
    "half of a character": ("a.jsonl", b'{"text": "\\ud800"}', DocumentColumns(), "a.jsonl:1"),
    "Latin-1": ("a.txt", "é".encode("latin-1"), DocumentColumns(), "a.txt"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), DocumentColumns(), "a.txt"),
    "a NUL character": ("a.md", b"some text\0", DocumentColumns(), "a.md"),
    "a PDF by another name": ("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", DocumentColumns(), "a.txt"),
    "a page of HTML": ("a.md", b"<!DOCTYPE html><p>x", DocumentColumns(), "a.md"),
    "a pointer of Git LFS": ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", DocumentColumns(), "a.txt"),
    "a compressed file that is cut": ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], DocumentColumns(), "a.txt.gz"),
    "a Parquet file that is cut": ("a.parquet", b"PAR1 and no more", DocumentColumns(), "a.parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, case: str) -> None:
    name, content, columns, named = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read([SourceFile(name, tmp_path / name)], columns)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


BAD_SETTINGS = {
    "": "source",
    "{source: a, from_contexts: true}": "source",
    "source: https://user:secret@host/x": "source",
    "{source: a, passages: {size: 8, overlap: 8}}": "passages.overlap",
    "{source: a, passages: {size: 0}}": "passages.size",
    "{source: a, passages: {by: sentence}}": "passages.by",
    "{source: a, index: {kind: sparse}}": "index.kind",
    "{source: a, index: {kind: dense}}": "index.model",
    "{source: a, index: {model: m}}": "index.model",
    "{source: a, index: {b: 1.5}}": "index.b",
    "{source: a, checks: {k: 0}}": "checks.k",
    "{source: a, checks: {min_hit: 2}}": "checks.min_hit",
    "{source: a, columns: {text: x, title: x}}": "columns.text",
    "{source: a, hits: 3}": "hits",
}


@pytest.mark.parametrize("text", BAD_SETTINGS)
def test_bad_settings(tmp_path: Path, text: str) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "towns.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_documents(tmp_path, "towns")
    assert f"towns.yaml: {BAD_SETTINGS[text]}: " in str(error.value)
    assert "secret" not in str(error.value)


def test_shipped_document_sets_are_valid() -> None:
    from paths import ROOT

    for path in (ROOT / "configs" / "documents").glob("*.yaml"):
        assert not [*impossible_documents(load_file(DocumentsConfig, path))]
