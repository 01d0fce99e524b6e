"""Files of every format: what is read, what is set aside by line, and what is refused whole."""

import csv
import gzip
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw import ingest, quarantined, rows_of

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers import KEPT_CHARACTERS, json_rows, read_records

GOOD = {"instruction": "Say a.", "context": "", "response": "a", "category": "open_qa", "messages": None}
ROW = {name: GOOD[name] for name in ("instruction", "context", "response", "category")}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13085339\n"
MANY = [{**ROW, "response": f"{i} ☕ " + "x" * (i % 700)} for i in range(3_000)]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    """The rows in the format of the file's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=4, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1_000)
    return path


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "ROWS.JSONL"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name.lower(), MANY)  # type: ignore[arg-type]
    path = path.rename(tmp_path / name)
    assert rows_of(path, out=tmp_path / "out") == [{**row, "messages": None} for row in MANY]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_byte_order_mark_is_passed_over(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"rows{suffix}", [ROW, ROW])  # type: ignore[list-item]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert rows_of(path, out=tmp_path / "out") == [GOOD, GOOD]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_compressed_text_gives_the_same_rows(tmp_path: Path, name: str, ending: str) -> None:
    content = written(tmp_path / name, MANY).read_bytes()  # type: ignore[arg-type]
    path = tmp_path / f"{name}{ending.upper()}"
    path.write_bytes(COMPRESS[ending](content))
    assert rows_of(path, out=tmp_path / "out") == [{**row, "messages": None} for row in MANY]


def test_other_endings_of_the_same_formats(tmp_path: Path) -> None:
    """NDJSON, TSV, and both formats of Arrow; members of a gzip file that was appended to."""
    lines = written(tmp_path / "rows.jsonl", MANY).read_bytes()  # type: ignore[arg-type]
    (tmp_path / "rows.ndjson").write_bytes(lines)
    (tmp_path / "twice.jsonl.gz").write_bytes(gzip.compress(lines[:100_000]) + gzip.compress(lines[100_000:]))
    table = pa.Table.from_pylist(MANY)
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as stream:
        stream.write_table(table)
    with open(tmp_path / "rows.tsv", "w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(MANY[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(MANY)
    for name in ("rows.ndjson", "twice.jsonl.gz", "file.arrow", "stream.arrow", "rows.tsv"):
        assert rows_of(tmp_path / name, out=tmp_path / "out") == [{**row, "messages": None} for row in MANY]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"instruction": "i", "response": "a", "response": "b"}', "response"),
        ('{"instruction": "i", "response" : "a", "response"\t: "a"}', "response"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "content"),
        ('{"instruction": "i", "response": "r", "extra": {"a": [{"b": 1, "c": 2, "b": 3}]}}', "b"),
        ('{"instruction": "a \\" : b", "response": "r", "response": "s"}', "response"),
        ('{"response": "a", "resp\\u006fnse": "b", "instruction": "i"}', "response"),
    ],
)
def test_duplicate_key_is_set_aside_by_line(tmp_path: Path, text: str, key: str) -> None:
    good = json.dumps({**ROW, "response": 'a": "b'})
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{text}\n{good}\n")
    (tmp_path / "rows.json").write_text(f"[{good},\n{text},\n{good}]")
    for name in ("rows.jsonl", "rows.json"):
        assert len(rows_of(tmp_path / name, out=tmp_path / "out")) == 2
        (bad,) = quarantined(tmp_path / "out")
        assert (bad["line"], bad["text"].strip()) == (2, text)
        assert f"'{key}'" in bad["reason"]


def test_byte_order_marks_of_joined_files_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n") * 2)
    assert rows_of(path, out=tmp_path / "out") == [GOOD, GOOD]


def test_lines_that_are_nearly_json_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\n".join([json.dumps(ROW).encode(), json.dumps(ROW).encode() + b",", b'{"instruction": "a\0b"}'])
    )
    assert rows_of(path, out=tmp_path / "out") == [GOOD]
    assert [bad["line"] for bad in quarantined(tmp_path / "out")] == [2, 3]


def test_blank_lines_are_passed_over_and_lines_still_right(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\r\n" + json.dumps(ROW).encode() + b"\r\n\r\n  \n[]\n" + json.dumps(ROW).encode())
    assert rows_of(path, out=tmp_path / "out") == [GOOD, GOOD]
    assert [bad["line"] for bad in quarantined(tmp_path / "out")] == [5]


def test_array_window_moves_over_any_chunk_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, white space and numbers cut at every possible place."""
    path = written(tmp_path / "rows.json", [{**ROW, "response": f"a{i}"} for i in range(5)])
    for chunk in range(1, 40):
        monkeypatch.setattr(json_rows, "CHUNK", chunk)
        records = list(read_records(path))
        assert [record.row["response"] for record in records] == [f"a{i}" for i in range(5)]  # type: ignore[union-attr]
        assert [record.line for record in records] == [2, 8, 14, 20, 26]


def test_array_of_jsonl_name_and_lines_of_json_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps([ROW, ROW]))
    (tmp_path / "b.json").write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    for name in ("a.jsonl", "b.json"):
        assert rows_of(tmp_path / name, out=tmp_path / "out") == [GOOD, GOOD]


def test_csv_fields_hold_lines_commas_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('response,instruction\n"a\n""b"", c",Say a.\n5" disk,What?\n\nx,y,z\nlast,Say.\n', encoding="utf-8")
    assert [row["response"] for row in rows_of(path, out=tmp_path / "out")] == ['a\n"b", c', '5" disk', "last"]
    (bad,) = quarantined(tmp_path / "out")
    assert (bad["line"], bad["text"]) == (6, "x,y,z\n")
    assert re.findall(r"\d+", bad["reason"]) == ["3", "2"], "fields of the row, and of the header"


def test_stray_quote_in_a_csv_field_sets_that_row_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('instruction,response\na,b\n"5" disk",x\nc,d\n', encoding="utf-8")
    assert [row["instruction"] for row in rows_of(path, out=tmp_path / "out")] == ["a", "c"]
    (bad,) = quarantined(tmp_path / "out")
    assert bad["line"] == 3
    assert bad["text"] == '"5" disk",x\n'


def test_a_row_of_many_megabytes_is_set_aside_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(ROW) + "\n" + json.dumps({**ROW, "response": "x" * 50_000_000}) + "\n")
        file.write(json.dumps(ROW) + "\n")
    assert rows_of(path, out=tmp_path / "out") == [GOOD, GOOD]
    (bad,) = quarantined(tmp_path / "out")
    assert bad["line"] == 2
    assert "50,000,0" in bad["reason"]
    assert len(bad["reason"]) < 200
    assert len(bad["text"]) == KEPT_CHARACTERS


def test_parquet_with_conversations_and_nulls(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2
    rows = [{"messages": turns, "category": None}, {"messages": None, "category": "x"}]
    path = written(tmp_path / "rows.parquet", rows)  # type: ignore[arg-type]
    (row,) = rows_of(path, out=tmp_path / "out")
    assert row["messages"] == turns
    assert [bad["line"] for bad in quarantined(tmp_path / "out")] == [2]


def test_parquet_text_that_is_not_utf8_sets_that_row_aside(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c", b"d", b"\xfe"]).view(pa.string())
    pq.write_table(pa.table({"instruction": texts, "response": texts}), tmp_path / "rows.parquet")
    assert [row["response"] for row in rows_of(tmp_path / "rows.parquet", out=tmp_path / "out")] == ["a", "c", "d"]
    assert [(bad["line"], "UTF-8" in bad["reason"]) for bad in quarantined(tmp_path / "out")] == [(2, True), (5, True)]


def test_parquet_value_that_python_cannot_hold_sets_that_row_aside(tmp_path: Path) -> None:
    times = pa.array([0, 2**62, None]).cast(pa.timestamp("us"))
    table = pa.table({"instruction": ["a", "b", "c"], "response": ["a", "b", "c"], "at": times})
    pq.write_table(table, tmp_path / "rows.parquet")
    records = list(read_records(tmp_path / "rows.parquet"))
    assert [hasattr(record, "row") for record in records] == [True, False, True]
    assert records[0].row["at"] == datetime(1970, 1, 1)  # type: ignore[union-attr]


def test_parquet_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, ["instruction", "response", "response"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet.*'response'"):
        list(read_records(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("a.jsonl", '{"instruction": "i"}'.encode("utf-16"), "UTF-16"),
        ("a.csv", "instruction,response\na,b\n".encode("utf-16"), "UTF-16"),
        ("a.csv", b"i\0n\0s\0t\0,\0r\0\n\0", "UTF-16"),
        ("a.jsonl", b"\x1f\x8b\x08rest", "gzip"),
        ("a.jsonl", zstd(b"{}"), "zst"),
        ("a.json", b"ARROW1rest", r"\.arrow"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", "HTML"),
        ("a.jsonl", LFS_POINTER, "git lfs pull"),
        ("a.parquet", LFS_POINTER, "git lfs pull"),
        ("a.arrow", LFS_POINTER, "git lfs pull"),
        ("a.csv", LFS_POINTER, "git lfs pull"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": "b"}\n' * 99, mtime=0)[:-9], "truncated"),
        ("a.csv.zst", zstd(b"instruction,response\n")[:-3], "cannot be read"),
        ("a.arrow", b"ARROW1 and so on", "Arrow"),
        ("a.arrow", b"", "Arrow"),
        ("a.json", b'{\n "version": 1,\n "data": [\n {"instruction": "i"}]}', "'data'"),
        ("a.json", b'{"data": [\n {"instruction": "i"}]}', "'data'"),
        ("a.jsonl", b'{"a": "b"}\r{"a": "b"}\r', ":1: .*CR"),
        ("a.tsv", b"instruction,response\na,b\n", ":1: .*tabs"),
        ("a.csv", b"PK\x03\x04rest", "zip"),
        ("a.json", b"PAR1rest", r"\.parquet"),
        ("a.json", b'{\n "instruction": "i",\n "response": "r"\n}', "array"),
        ("a.json", b'[{"a": 1},\n {"a": 2},\n {"a"', ":3: "),
        ("a.json", b'[{"a": 1},\n {"a": 2}\n {"a": 3}]', r":3: .*\{"),
        ("a.json", b'[{"a": 1},\n]', ":2: "),
        ("a.json", b'[{"a": 1}]\n[', ":2: "),
        ("a.json", b'[{"a": 1}', ":1: "),
        ("a.json", b"[" * 100_000, ":1: "),
        ("a.csv", b'instruction,response\na,b\nc,"d\ne,f\ng,h\n', r":3: .* 2 lines"),
        ("a.csv", b"instruction;response\na;b\n", ":1: .*'instruction;response'"),
        ("a.csv", b"instruction,response,response\na,b,c\n", "'response'"),
        ("a.parquet", b"PAR1 and so on", "Parquet"),
        ("a.parquet", b"", "Parquet"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.json", b"[ ]", "no rows"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"instruction,response\n", "no rows"),
    ],
)
def test_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, facts: str) -> None:
    (tmp_path / name).write_bytes(content)
    between = "" if facts.startswith(":") else ".*"
    with pytest.raises(DataError, match=f"{re.escape(name)}{between}{facts}") as error:
        ingest(tmp_path / "out", tmp_path / name)
    assert "\n" not in str(error.value)


def test_truncated_parquet_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", MANY)  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"rows\.parquet"):
        ingest(tmp_path / "out", path)


def test_a_row_of_an_array_that_never_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 2_000)
    monkeypatch.setattr(json_rows, "CHUNK", 500)
    (tmp_path / "rows.json").write_text('[{"a": 1},\n{"a": "' + "x" * 10_000)
    with pytest.raises(DataError, match=r"rows\.json:2: .*2,000"):
        ingest(tmp_path / "out", tmp_path / "rows.json")


@pytest.mark.system
@pytest.mark.real_data
def test_all_of_dolly_is_read_as_json_reads_it(tmp_path: Path, dolly: Path) -> None:
    expected = [
        {**json.loads(line), "messages": None} for line in dolly.read_text(encoding="utf-8").split("\n") if line
    ]
    assert len(expected) == 15_011
    assert rows_of(dolly, out=tmp_path) == expected
    assert quarantined(tmp_path) == []
