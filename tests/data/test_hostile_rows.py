"""Rows, files and columns that are made to take the reader down: one error or quarantined rows, in bounded time."""

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from limited import run_limited
from tiers import every_third, tiered

from finetune_assets.assets.dolly_raw import _describe
from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.errors import DataError
from finetune_assets.data.ingest import OTHER_CATEGORIES, RawStatistics, write_raw
from finetune_assets.data.readers import SourceFile, parquet_pages, read_records
from finetune_assets.data.readers.arrow_messages import check_batches
from finetune_assets.store.results import Results

LONG = "x" * (4 << 20)
GOOD = {"instruction": "i", "response": "r"}


def ingested(path: Path) -> Callable[[], dict[str, Any]]:
    """A function that reads a file as `dolly_raw` does, and returns counts and reasons."""

    def read() -> dict[str, Any]:
        (out := path.parent / "out").mkdir(exist_ok=True)
        statistics = write_raw([SourceFile(path.name, path)], Columns(), out)
        return {"rows": statistics.rows, "quarantined": statistics.quarantined, "reasons": statistics.reasons}

    return read


def parquet(table: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def repeated(text: str, rows: int) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))


def bomb(text: str, rows: int) -> bytes:
    return parquet(pa.table({"instruction": repeated(text, rows), "response": ["r"] * rows}), compression="zstd")


def list_bomb() -> bytes:
    texts = repeated("y" * (1 << 20), 20_000)
    turns = pa.ListArray.from_arrays(pa.array([0, 20_000], pa.int32()), texts)
    return parquet(pa.table({"instruction": ["i"], "response": ["r"], "extra": turns}), compression="zstd")


def arrow(batches: int, codec: str | None = None, **columns: Any) -> bytes:
    sink = io.BytesIO()
    batch = pa.record_batch(columns)
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    return sink.getvalue()


def zeros(size: int, byte: bytes = b"\0") -> bytes:
    sink = io.BytesIO()
    with gzip.GzipFile(fileobj=sink, mode="wb", compresslevel=1) as file:
        for _ in range(size >> 24):
            file.write(byte * (1 << 24))
    return sink.getvalue()


def line(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def chat(**turn: object) -> bytes:
    return line({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **turn}]})


def raw_json(value: str) -> bytes:
    return b'{"instruction": "i", "response": "r", "extra": ' + value.encode() + b"}\n"


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a Parquet text of 4 MiB in 10,000 rows": ("rows.parquet", lambda: bomb(LONG, 10_000)),
    "a Parquet text of 1 MiB in 30,000 rows": ("rows.parquet", lambda: bomb(LONG[: 1 << 20], 30_000)),
    "a Parquet text of 64 MiB": ("rows.parquet", lambda: bomb("x" * (64 << 20), 100)),
    "a Parquet text in a list": ("rows.parquet", list_bomb),
    "Parquet rows without content": ("rows.parquet", lambda: parquet(pa.table({"a": pa.nulls(30_000_000)}))),
    "Parquet of 40,000 columns": ("rows.parquet", lambda: parquet(pa.table({f"c{i}": ["x"] for i in range(10_001)}))),
    "an Arrow text in a dictionary": ("rows.arrow", lambda: arrow(1, instruction=repeated(LONG, 100_000))),
    "Arrow rows without content": ("rows.arrow", lambda: arrow(1, a=pa.nulls(30_000_000))),
    "a compressed batch of Arrow": ("rows.arrow", lambda: arrow(1, "zstd", instruction=["x" * (1 << 30)])),
    "a compressed dictionary of Arrow": ("rows.arrow", lambda: arrow(1, "lz4", a=repeated("x" * (1 << 30), 2))),
    "40,000 columns of CSV": ("rows.csv", lambda: ",".join(f"c{i}" for i in range(40_000)).encode() + b"\n1\n"),
    "CSV with one column twice": ("rows.csv", lambda: ("c," * 40_000).encode() + b"\n1\n"),
    "a million keys": ("rows.jsonl", lambda: line({f"instructio{i}": 1 for i in range(1_000_000)})),
    "rows of 100 new keys": (
        "rows.jsonl",
        lambda: b"".join(line({f"instr{n}uctin{i}": "" for i in range(100)} | GOOD) for n in range(400)),
    ),
    "a million keys, the last twice": (
        "rows.jsonl",
        lambda: b"{" + b",".join(b'"k%d":1' % i for i in range(800_000)) + b',"k1":2}\n',
    ),
    "256 MiB of zeros": ("rows.jsonl.gz", lambda: zeros(256 << 20)),
    "256 MiB of lines": ("rows.jsonl.gz", lambda: zeros(256 << 20, b"\n")),
    "256 MiB of separators": ("rows.csv.gz", lambda: zeros(256 << 20, b",")),
    "256 MiB of an array": ("rows.json.gz", lambda: zeros(256 << 20, b"[")),
    "zstd": (
        "rows.jsonl.zst",
        lambda: pa.compress(b" " * (256 << 20), codec="zstd", asbytes=True),
    ),
    "a line without an end": ("rows.jsonl", lambda: b"x" * (300 << 20)),
    "turns as deep text": ("rows.jsonl", lambda: line({"messages": nested(100_000)})),
    "turns as less deep text": ("rows.jsonl", lambda: line({"messages": nested(900)})),
    "arguments as deep text": (
        "rows.jsonl",
        lambda: chat(tool_calls=[{"name": "f", "arguments": '{"a": ' + nested(800) + "}"}]),
    ),
    "deep arguments": (
        "rows.jsonl",
        lambda: chat(tool_calls=[{"name": "f", "arguments": {"a": json.loads(nested(400))}}]),
    ),
    "a deep value in a row": ("rows.jsonl", lambda: raw_json(nested(700)) * 5 + raw_json(nested(100_000))),
    "a deep array": ("rows.json", lambda: ("[" + nested(100_000) + "]").encode()),
    "huge numbers": ("rows.jsonl", lambda: raw_json("9" * 100_000) + raw_json("1e999") + raw_json("9" * 4_000)),
    "a key of 8 MB": ("rows.jsonl", lambda: line({"k" * (8 << 20): "x"})),
    "a category of 8 MB": ("rows.jsonl", lambda: line({**GOOD, "category": "c" * (8 << 20)})),
}


LARGE = {
    "a million keys",
    "a million keys, the last twice",
    "a category of 8 MB",
    "rows of 100 new keys",
    "a compressed dictionary of Arrow",
}
"""Of a kind that another one stands for in `make test`."""


@pytest.mark.parametrize("name", tiered(BOMBS, every_third(name for name in BOMBS if name not in LARGE)))
def test_a_small_file_takes_no_reader_down(name: str, tmp_path: Path) -> None:
    file, make = BOMBS[name]
    (path := tmp_path / file).write_bytes(make())
    outcome = run_limited(ingested(path))
    outcome.check(("", "DataError"))
    assert outcome.error or "'quarantined': 0" not in outcome.text or "'rows': 0" not in outcome.text
    assert not outcome.error or str(path) in outcome.text


def test_rows_of_parquet_that_are_too_long_are_quarantined(tmp_path: Path) -> None:
    table = pa.table({"instruction": ["i", "x" * (17 << 20), "j"], "response": ["r"] * 3})
    pq.write_table(table, path := tmp_path / "rows.parquet")
    first, second, third = read_records(path)
    assert (first.line, second.line, third.line) == (1, 2, 3)
    assert "17,8" in second.reason  # type: ignore[union-attr]
    assert third.row["instruction"] == "j"  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{"compression": codec} for codec in ("snappy", "zstd", "gzip", "lz4", "none")])
def test_ordinary_parquet_is_read_in_all_compressions(options: dict[str, str], tmp_path: Path) -> None:
    rows = [{"instruction": f"i{n}" * 50, "response": f"r{n % 7}" * 200} for n in range(3_000)]
    for version in ("1.0", "2.0"):
        pq.write_table(
            pa.Table.from_pylist(rows), path := tmp_path / "rows.parquet", data_page_version=version,
            row_group_size=1_000, write_page_index=True, **options,
        )  # fmt: skip
        assert [record.row for record in read_records(path)] == rows  # type: ignore[union-attr]


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
@pytest.mark.parametrize("is_file", [True, False])
def test_ordinary_arrow_is_read_in_all_compressions(codec: str | None, is_file: bool, tmp_path: Path) -> None:
    rows = [{"instruction": f"i{n}" * 50, "response": f"r{n % 7}", "n": n} for n in range(3_000)]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(1, "response", table["response"].dictionary_encode())
    new, options = pa.ipc.new_file if is_file else pa.ipc.new_stream, pa.ipc.IpcWriteOptions(compression=codec)
    with new(str(path := tmp_path / "rows.arrow"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=700)
    assert [record.row for record in read_records(path)] == rows  # type: ignore[union-attr]
    assert check_batches(path, is_file) == 5
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"rows\.arrow"):
        list(read_records(path))


def test_a_batch_that_only_the_footer_of_an_arrow_file_names_is_refused(tmp_path: Path) -> None:
    """Batches are checked in the order of the file, and a reader of the footer would see others."""
    marker, end = b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\0\0\0\0"
    content = arrow(2, instruction=["i"], response=["r"])
    (path := tmp_path / "rows.arrow").write_bytes(content)
    assert len(list(read_records(path))) == 2
    second = content.rindex(marker, 0, content.rindex(end))
    path.write_bytes(content[:second] + end + content[second + len(end) :])
    with pytest.raises(DataError, match=r"rows\.arrow.*1"):
        list(read_records(path))


def test_texts_of_lists_in_dictionaries_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are kept in dictionaries, because they decode to much more than the file has."""
    monkeypatch.setattr(parquet_pages, "_expands", lambda *_: True)
    turns = pa.ListArray.from_arrays(pa.array([*range(0, 10_001, 2)], pa.int32()), repeated("t" * 2_000, 10_000))
    pq.write_table(pa.table({"texts": turns}), path := tmp_path / "rows.parquet", compression="zstd")
    records = [record.row["texts"] for record in read_records(path)]  # type: ignore[union-attr]
    assert len(records) == 5_000
    assert all(texts == ["t" * 2_000] * 2 for texts in records)


@pytest.mark.system
def test_metadata_names_the_first_hundred_of_many_categories(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line({**GOOD, "category": f"c{n}" * 100}) for n in range(20_000)))
    (out := tmp_path / "out").mkdir()
    statistics = write_raw([SourceFile("rows.jsonl", path)], Columns(), out, None)
    assert len(statistics.categories) == 10_001
    assert statistics.categories[OTHER_CATEGORIES] == 10_000
    assert max(map(len, statistics.categories)) == 200
    drawn = Results(tmp_path / "drawn")
    metadata = _describe(vars(statistics) | {"quality": vars(statistics.quality)}, drawn)
    assert metadata["categories"].value.count("\n") == 101  # type: ignore[attr-defined]
    assert metadata["category_count"] == 10_001
    assert "category_count" not in _describe({**vars(RawStatistics()), "quality": {"lengths": {}}}, drawn)


KEYS = ["instruction", "response", "messages", "tools", "category", "system", "history", "chosen", "context", "id"]
VALUES: list[Callable[[random.Random], str]] = [
    lambda rng: nested(rng.choice([5, 90, 500, 5_000, 200_000])),
    lambda rng: json.dumps(nested(rng.choice([5, 900, 50_000]))),
    lambda rng: rng.choice(["9" * 5_000, "-1e400", "NaN", "null", "1e308", "0.1", "[]", "{}", '""', "true"]),
    lambda rng: json.dumps("".join(rng.choices("\x1b[2J\u202e\x00\ud800é日{}%$\\\"'`|<>&\n", k=200))),
    lambda rng: json.dumps({"".join(rng.choices("abc\x1b\u202e", k=9)): rng.random() for _ in range(5)}),
    lambda rng: json.dumps([{"role": rng.choice(["user", "assistant", "\x1b", ""]), "content": "\x9b31m" * 3}] * 3),
    lambda rng: json.dumps("y" * rng.choice([10, 100_000, 3_000_000])),
    lambda rng: '{"a":' * 3_000 + "1" + "}" * 3_000,
]


@pytest.mark.parametrize("seed", tiered(range(120), every_third(range(120))))
def test_hostile_rows_are_quarantined_with_one_line(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    pairs = ", ".join(f"{json.dumps(rng.choice(KEYS))}: {rng.choice(VALUES)(rng)}" for _ in range(rng.randint(1, 4)))
    row = rng.choice(["{%s}", "[{%s}]", "{%s"]) % pairs
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row.encode(errors="surrogatepass") + b"\n" + line(GOOD))
    outcome = run_limited(ingested(path))
    outcome.check(("", "DataError"))
    if not outcome.error:
        assert "'rows': 1" in outcome.text or "'rows': 2" in outcome.text
