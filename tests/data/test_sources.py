"""Reading raw data: what is taken, and how each bad row is told."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from finetune_assets.data.rows import RAW_SCHEMA
from finetune_assets.data.sources import PARQUET, DataError, read_rows, source_files, write_parquet

GOOD = {"instruction": "Say a.", "context": "", "response": "a", "category": "open_qa"}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_come_out_as_they_went_in(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "context": "Zeile\nzwei ☕", "response": '"quoted"'}]
    statistics = write_parquet([jsonl(tmp_path / "rows.jsonl", *rows)], tmp_path)
    table = pq.read_table(tmp_path / PARQUET)
    assert table.schema.equals(RAW_SCHEMA)
    assert table.to_pylist() == rows
    assert (statistics.rows, statistics.with_context, statistics.categories) == (2, 1, {"open_qa": 2})


def test_context_and_category_may_be_missing_or_null(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"instruction": "i", "response": "r"}, {**GOOD, "context": None})
    assert [row["context"] for row in read_rows(path)] == ["", ""]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}.jsonl", {**GOOD, "response": name})
    files = source_files(str(tmp_path), tmp_path)
    assert [row["response"] for file in files for row in read_rows(file)] == ["a", "b"]


def test_other_keys_are_passed_over(tmp_path: Path) -> None:
    assert list(read_rows(jsonl(tmp_path / "rows.jsonl", {**GOOD, "id": 7, "input": ""}))) == [GOOD]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n  \n" + json.dumps(GOOD).encode())
    assert list(read_rows(path)) == [GOOD, GOOD]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"instruction": "i", "resp', ["not JSON", "column"]),
        (b'{"instruction": "\xff", "response": "r"}', ["not UTF-8"]),
        (b"[1, 2]", ["JSON object", "[1, 2]"]),
        (b'{"response": "r"}', ["'instruction' is missing", "response"]),
        (b'{"instruction": "i", "output": "r"}', ["'response' is missing", "output"]),
        (b'{"instruction": "i", "response": "r", "input": "x"}', ["'input' would be lost", "'context'"]),
        (b'{"instruction": "i", "response": "r", "categry": "x"}', ["'categry' would be lost", "'category'"]),
        (b'{"instruction": "i", "response": 3}', ["'response' must be text", "3"]),
        (b'{"instruction": "i", "response": "r", "context": ["x"]}', ["'context' must be text"]),
        (b'{"instruction": "  ", "response": "r"}', ["'instruction' is blank"]),
        (b'{"instruction": "i", "response": null}', ["'response' is blank"]),
        (b'{"instruction": "i", "response": "\\ud800"}', ["'response'", "surrogate"]),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, line: bytes, words: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    for word in [f"{path}:2", *words]:
        assert word in str(error.value)


def test_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        write_parquet([tmp_path / "rows.jsonl"], tmp_path)


@pytest.mark.parametrize(("name", "words"), [("gone.jsonl", "does not exist"), ("rows.xlsx", "JSON Lines")])
def test_unusable_source_is_told(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(DataError, match=words):
        source_files(name, tmp_path)


def test_folder_without_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no file that ends in \.jsonl"):
        source_files(str(tmp_path), tmp_path)
