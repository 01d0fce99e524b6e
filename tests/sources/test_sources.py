"""What `source` means, and that the raw data's identity is its content."""

import json
from pathlib import Path

import pytest

from finetune_assets.artifacts.kinds import RAW
from finetune_assets.config.raw_data_schema import Columns, RawDataConfig
from finetune_assets.data.errors import DataError
from finetune_assets.sources.local import SAMPLE
from finetune_assets.sources.raw_data import open_source
from finetune_assets.sources.source import SourceContext


def names(source: str, root: Path) -> list[str]:
    return [file.name for file in open_source(SourceContext(RawDataConfig(source=source), root)).files()]


def identity(source: str, root: Path, **columns: str) -> str:
    content = open_source(SourceContext(RawDataConfig(source=source), root)).content()
    return RAW.fingerprint(RawDataConfig(columns=Columns(**columns)), content=content)


def test_the_packaged_sample(tmp_path: Path) -> None:
    (file,) = open_source(SourceContext(RawDataConfig(), tmp_path)).files()
    assert file.path == SAMPLE


def test_a_folder_is_read_whole_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "deep/c.parquet", "D.JSON", "notes.txt", ".half.jsonl", ".tmp/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert names(str(tmp_path), tmp_path) == ["D.JSON", "a.csv", "b.jsonl", "deep/c.parquet"]


def test_identity_is_content_format_and_columns_not_names(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "b.csv"):
        (tmp_path / name).write_text("{}")
    assert identity("a.jsonl", tmp_path) == identity("b.jsonl", tmp_path)
    assert identity("a.jsonl", tmp_path) != identity("b.csv", tmp_path)
    assert identity("a.jsonl", tmp_path) != identity("a.jsonl", tmp_path, response="answer")
    before = identity("a.jsonl", tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "i"}))
    assert identity("a.jsonl", tmp_path) != before


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        ("gone.jsonl", "gone.jsonl.*hf://datasets/owner/name"),
        ("rows.xlsx", r"rows\.xlsx.*\.jsonl, \.json, \.csv, \.parquet"),
        ("empty", r"empty.*\.jsonl"),
        ("hf://owner/name", "hf://owner/name.*hf://datasets/owner/name"),
        ("hf://datasets/a/b/c.jsonl", r"hf://datasets/a/b/c\.jsonl.*hf://datasets/owner/name"),
    ],
)
def test_unusable_source_is_named(tmp_path: Path, source: str, facts: str) -> None:
    (tmp_path / "rows.xlsx").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=facts):
        open_source(SourceContext(RawDataConfig(source=source), tmp_path))
