"""Rows as sources write them become rows of one schema; what would lose something is set aside with its reason."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from raw import OPTIONAL, ingest, quarantined, rows_of

from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.ingest import PARQUET, write_raw
from finetune_assets.data.raw_schema import RAW_SCHEMA
from finetune_assets.data.readers import SourceFile

GOOD = {"instruction": "Say a.", "context": "", "response": "a", "category": "open_qa", "messages": None}
SYSTEM, ASKED, SAID = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
)


def read(tmp_path: Path, *rows: Any, columns: Columns | None = None) -> list[dict[str, Any]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows_of(path, out=tmp_path, columns=columns)


def test_rows_come_out_as_they_went_in(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "context": "Zeile\nzwei ☕", "response": '"quoted"'}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    statistics = write_raw([SourceFile("rows.jsonl", path)], Columns(), tmp_path)
    table = pq.read_table(tmp_path / PARQUET)
    assert table.schema.equals(RAW_SCHEMA)
    assert table.to_pylist() == [{**dict.fromkeys(OPTIONAL), **row} for row in rows]
    assert (statistics.rows, statistics.with_context, statistics.categories) == (2, 1, {"open_qa": 2})
    assert (statistics.quarantined, statistics.quarantine_share) == (0, 0)


def test_context_and_category_may_be_missing_or_null(tmp_path: Path) -> None:
    rows = read(tmp_path, {"instruction": "i", "response": "r"}, {**GOOD, "context": None})
    assert [row["context"] for row in rows] == ["", ""]


def test_other_keys_are_passed_over(tmp_path: Path) -> None:
    assert read(tmp_path, {**GOOD, "id": 7, "input": ""}) == [GOOD]


def test_alpaca_rows(tmp_path: Path) -> None:
    rows = read(tmp_path, {"instruction": "i", "input": "c", "output": "r"}, {"instruction": "i", "output": "r"})
    assert [(row["context"], row["response"]) for row in rows] == [("c", "r"), ("", "r")]


def test_numbers_are_categories(tmp_path: Path) -> None:
    assert read(tmp_path, {**GOOD, "category": 3})[0]["category"] == "3"


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_conversation_is_kept_whole(tmp_path: Path, key: str) -> None:
    turns = [SYSTEM, ASKED, SAID, {"role": "user", "content": " Bye \n"}, {"role": "assistant", "content": "See you"}]
    (row,) = read(tmp_path, {key: turns, "category": "chat"})
    assert row == {
        "instruction": "Hi",
        "context": "Be brief.",
        "response": "See you",
        "category": "chat",
        "messages": turns,
    }


def test_a_conversation_may_begin_with_the_assistant_and_end_with_the_user(tmp_path: Path) -> None:
    turns = [SAID, ASKED]
    (row,) = read(tmp_path, {"messages": turns})
    assert (row["instruction"], row["response"], row["messages"]) == ("Hi", "Hello", turns)


def test_one_question_and_its_answer_are_instruction_and_response(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"messages": [ASKED, SAID]})
    assert row == {"instruction": "Hi", "context": "", "response": "Hello", "category": "", "messages": None}


def test_sharegpt_turns_text_parts_and_json_in_a_cell(tmp_path: Path) -> None:
    shared = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in (SYSTEM, ASKED, SAID)]
    rows = read(
        tmp_path, {"conversations": shared}, {"messages": parts}, {"messages": json.dumps([SYSTEM, ASKED, SAID])}
    )
    assert [row["messages"] for row in rows] == [[SYSTEM, ASKED, SAID]] * 3


def test_a_system_column_becomes_the_first_turn(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        {"system": "Be brief.", "messages": [ASKED, SAID, ASKED, SAID]},
        {"system": "Be brief.", "instruction": "Hi", "input": "It rains.", "output": "Hello"},
    )
    assert rows[0]["messages"] == [SYSTEM, ASKED, SAID, ASKED, SAID]
    assert rows[1]["messages"] == [SYSTEM, {"role": "user", "content": "Hi\n\nIt rains."}, SAID]


def test_column_map_serves_other_names(tmp_path: Path) -> None:
    columns = Columns(instruction="question", context="passage", response="answer", category="topic", messages="dialog")
    rows = read(
        tmp_path,
        {"question": "q", "passage": "p", "answer": "a", "topic": "t", "response": "not this"},
        {"dialog": [SYSTEM, ASKED, SAID]},
        columns=columns,
    )
    assert rows[0] == {"instruction": "q", "context": "p", "response": "a", "category": "t", "messages": None}
    assert rows[1]["messages"] == [SYSTEM, ASKED, SAID]


def turns(*changed: Any) -> dict[str, Any]:
    return {"messages": [ASKED, *changed]}


BAD: list[tuple[Any, list[str]]] = [
    ([1, 2], ["JSON", "[1, 2]"]),
    (None, ["JSON", "null"]),
    ({"response": "r"}, ["'instruction'", "response", "columns"]),
    ({"title": "q", "body": "a"}, ["'instruction'", "title", "body", "raw_data.yaml"]),
    ({}, ["'instruction'"]),
    ({"instruction": "i", "respones": "r"}, ["'respones'", "'response'"]),
    ({"instruction": "i", "response": "r", "categry": "x"}, ["'categry'", "'category'"]),
    ({"instruction": "i", "response": "r", "context": "a", "input": "b"}, ["'context'", "'input'"]),
    ({"instruction": "i", "response": 3}, ["'response'", "3"]),
    ({"instruction": "i", "response": "r", "context": ["x"]}, ["'context'", '["x"]']),
    ({"instruction": "i", "response": "r", "category": {"a": 1}}, ["'category'", '{"a": 1}']),
    ({"instruction": "  ", "response": "r"}, ["'instruction'"]),
    ({"instruction": "i", "response": None}, ["'response'"]),
    ({"instruction": "i", "output": ""}, ["'output'"]),
    ({"instruction": "\ud800", "response": "r"}, ["'instruction'", "UTF-8"]),
    ({"instruction": "i", "response": "\ud800"}, ["'response'", "UTF-8"]),
    ({"messages": "Hi"}, ["'messages'", "list"]),
    ({"messages": "[oops"}, ["'messages'", "JSON"]),
    (turns("Hello"), ["turn 2"]),
    (turns({"role": "wizard", "content": "x"}), ["turn 2", "wizard", "system, user, assistant"]),
    (turns({"content": "x"}), ["turn 2", "role", "null"]),
    (turns({"role": "assistant", "content": None}), ["turn 2", "content"]),
    (turns({"role": "assistant", "content": [1, 2]}), ["turn 2", "content"]),
    (turns({"role": "assistant", "content": " "}), ["turn 2", "content"]),
    (turns({"role": "assistant", "content": "\ud800"}), ["turn 2", "UTF-8"]),
    (turns({**SAID, "tool_calls": [{"id": 1}]}), ["turn 2", "'tool_calls'"]),
    (turns({**SAID, "weight": 0}), ["'weight'", "0"]),
    (turns(), ["assistant"]),
    (turns(SAID, SYSTEM), ["turn 3", "system"]),
]


@pytest.mark.parametrize(("row", "facts"), BAD)
def test_bad_row_is_set_aside_with_its_reason(tmp_path: Path, row: Any, facts: list[str]) -> None:
    assert read(tmp_path, GOOD, row, GOOD) == [GOOD, GOOD]
    (bad,) = quarantined(tmp_path)
    assert (bad["file"], bad["line"]) == ("rows.jsonl", 2)
    for fact in facts:
        assert fact in bad["reason"]
    assert json.loads(bad["text"]) == row, "the row itself is kept"


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        (b'{"instruction": "i", "resp', ["JSON", "column 22"]),
        (b'{"instruction": "\xff", "response": "r"}', ["UTF-8", "byte 17"]),
        (b"[" * 100_000, []),
        (b'{"instruction": ' + b"9" * 5_000 + b', "response": "r"}', []),
    ],
)
def test_line_that_is_no_json_is_set_aside(tmp_path: Path, line: bytes, facts: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    ingest(tmp_path, path)
    (bad,) = quarantined(tmp_path)
    assert bad["line"] == 2
    assert bad["reason"]
    for fact in facts:
        assert fact in bad["reason"]


def test_reasons_and_the_first_bad_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [GOOD, *[[1]] * 8, {"instruction": "i"}]))
    statistics = write_raw([SourceFile("rows.jsonl", path)], Columns(), tmp_path)
    assert statistics.quarantine_share == 0.9
    assert sorted(statistics.reasons.values()) == [1, 8]
    assert [bad["line"] for bad in statistics.first_quarantined] == [2, 3, 4, 5, 6]


def test_nothing_is_lost_whatever_the_mixture(tmp_path: Path) -> None:
    """Good and bad rows of several files: each is in one of the two, in order, under its own line."""
    files = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for pair in BAD for row in (GOOD, pair[0])))
        files.append(path)
    out = tmp_path / "out"
    assert len(rows_of(*files, out=out)) == 2 * len(BAD)
    assert [(bad["file"], bad["line"]) for bad in quarantined(out)] == [
        (f"{name}.jsonl", 2 * i + 2) for name in ("a", "b") for i in range(len(BAD))
    ]
