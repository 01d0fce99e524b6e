"""Columns: which names are read, what is joined, what is refused, and what is counted as ignored."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw import quarantined, rows_of

from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.errors import BadRow, DataError
from finetune_assets.data.ingest import RawStatistics, write_raw
from finetune_assets.data.layouts import RowReader
from finetune_assets.data.layouts.joining import join_turns
from finetune_assets.data.layouts.values import Values
from finetune_assets.data.readers import SourceFile

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
AGAIN, LATER = {"role": "user", "content": "When?"}, {"role": "assistant", "content": "In 1702."}
PLAIN = {"instruction": "i", "response": "r"}


def read(row: Any, **columns: Any) -> dict[str, Any]:
    return RowReader(Columns(**columns))(row)


def reason(row: Any, **columns: Any) -> str:
    with pytest.raises(BadRow) as error:
        read(row, **columns)
    return str(error.value)


def statistics(tmp_path: Path, files: dict[str, list[Any]], **columns: Any) -> RawStatistics:
    sources = []
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(SourceFile(name, tmp_path / name))
    return write_raw(sources, Columns(**columns), tmp_path)


@pytest.mark.parametrize("prompt", ["instruction", "question", "prompt", "query"])
@pytest.mark.parametrize("answer", ["response", "output", "answer", "completion"])
def test_names_of_instruction_and_response(prompt: str, answer: str) -> None:
    row = read({prompt: "q", answer: "a", "passage": "p"})
    assert (row["instruction"], row["context"], row["response"]) == ("q", "p", "a")


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_names_of_the_system_prompt(name: str) -> None:
    assert read({name: "Be brief.", "question": "q", "response": "a"})["context"] == "Be brief."


def test_two_system_prompts_are_refused() -> None:
    turns = [{"role": "system", "content": "Be brief."}, ASKED, SAID]
    assert read({"system": "Be brief. ", "messages": turns})["messages"] == turns
    assert '"Be long."' in reason({"system_prompt": "Be long.", "messages": turns})


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({**PLAIN, "answer": "s"}, ["'response'", "'answer'", "columns.response"]),
        ({**PLAIN, "completion": "s"}, ["'response'", "'completion'", "columns.response"]),
        ({**PLAIN, "question": "q"}, ["'instruction'", "'question'", "columns.instruction"]),
        ({**PLAIN, "input": "a", "passage": "b"}, ["'input'", "'passage'", "columns.context"]),
        ({**PLAIN, "system": "a", "system_prompt": "b"}, ["'system'", "'system_prompt'"]),
    ],
)
def test_two_values_of_one_meaning_are_refused(row: Any, names: list[str]) -> None:
    assert all(name in reason(row) for name in names)


def test_two_names_with_one_value_are_read_and_a_setting_chooses() -> None:
    assert read({**PLAIN, "answer": "r"})["response"] == "r"
    assert read({**PLAIN, "answer": "s"}, response="answer")["response"] == "s"
    assert read({**PLAIN, "answer": "s"}, ignore=["answer"])["response"] == "r"


def test_a_column_that_is_given_one_meaning_has_no_other() -> None:
    row = read({"input": "q", "output": "a"}, instruction="input")
    assert (row["instruction"], row["context"], row["response"]) == ("q", "", "a")
    row = read({"context": "q", "question": "a"}, instruction="context", response="question")
    assert (row["instruction"], row["context"], row["response"]) == ("q", "", "a")


IDENTIFIERS = (
    "conversation_id context_id system_id response_id id uuid message_id turn_id conversationId conversation_hash "
    "context_len response-uuid prompt_tokens answer_type system_name question_id contextIds"
).split()


@pytest.mark.parametrize("key", IDENTIFIERS)
def test_identifiers_are_passed_over_and_counted(key: str) -> None:
    reader = RowReader(Columns())
    for row in ({**PLAIN, key: 7}, {"messages": [ASKED, SAID], key: "x"}):
        assert reader(row)["response"]
    assert reader.ignored == {key: 2}


@pytest.mark.parametrize(
    ("row", "meant"),
    [
        ({"instuction": "i", "response": "r"}, "instruction"),
        ({"instruction": "i", "reponse": "r"}, "response"),
        ({"conversaton": [ASKED, SAID]}, "conversations"),
        ({**PLAIN, "contex": "c"}, "context"),
        ({**PLAIN, "system_promt": "s"}, "system_prompt"),
        ({"Instruction": "i", "response": "r"}, "instruction"),
        ({"instruction": "i", "responses": "r"}, "response"),
        ({"question": "q", "response_a": "r"}, "response"),
    ],
)
def test_misspelt_columns_are_refused(row: Any, meant: str) -> None:
    assert f"did you mean '{meant}'" in reason(row)


def test_a_column_like_one_that_has_a_value_is_passed_over_and_counted() -> None:
    reader = RowReader(Columns())
    assert reader({**PLAIN, "answers": ["r", "s"], "notes": "n", "empty": None})["response"] == "r"
    assert reader.ignored == {"answers": 1, "notes": 1}


def test_history_becomes_earlier_turns() -> None:
    row = read({"instruction": "When?", "input": "", "output": "In 1702.", "history": [["Hi", "Hello"]], "system": "S"})
    assert row["messages"] == [{"role": "system", "content": "S"}, ASKED, SAID, AGAIN, LATER]
    assert read({**PLAIN, "history": json.dumps([["Hi", "Hello"]])})["messages"][:2] == [ASKED, SAID]
    for empty in (None, [], "", "[]"):
        assert read({**PLAIN, "history": empty})["messages"] is None


@pytest.mark.parametrize(
    "history",
    [["q", "a"], [["q"]], [["q", "a", "b"]], [["q", None]], [["q", " "]], "q", "[oops", {"q": "a"}, 3, [[1, 2]]],
)
def test_malformed_history_is_refused(history: Any) -> None:
    assert "'history'" in reason({**PLAIN, "history": history})


@pytest.mark.parametrize("name", ["response", "output", "answer", "completion"])
def test_a_response_answers_messages_that_end_with_the_user(name: str) -> None:
    assert read({"messages": [ASKED, SAID, AGAIN], name: "In 1702."})["messages"] == [ASKED, SAID, AGAIN, LATER]
    assert read({"messages": json.dumps([ASKED, SAID, AGAIN]), name: "In 1702."})["response"] == "In 1702."
    shared = [{"from": "human", "value": "Hi"}]
    assert read({"conversations": shared, name: "Hello"})["response"] == "Hello"
    assert read({"messages": [ASKED, SAID, AGAIN], name: "Hello"})["messages"][-1] == {**SAID}, "the same words again"


def test_columns_that_repeat_the_messages_add_nothing() -> None:
    """As UltraChat's `prompt` is its first turn."""
    messages = [{"role": "system", "content": "Paris is in France."}, ASKED, SAID, AGAIN, LATER]
    extra = {"prompt": "Hi ", "prompt_id": "x", "response": "In 1702.", "context": "Paris is in France."}
    assert read({"messages": messages, **extra})["messages"] == messages


def test_texts_that_are_json_stay_texts() -> None:
    chat = json.dumps([ASKED, SAID])
    row = read({"instruction": "Write a chat as JSON.", "output": chat})
    assert (row["response"], row["messages"]) == (chat, None)
    assert read({"prompt": [ASKED], "completion": chat})["response"] == chat


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"response": "No."}, "response"),
        ({"response": "Hello"}, "response"),
        ({"response": "1702"}, "response"),
        ({"completion": [SAID]}, "completion"),
        ({"instruction": "Other"}, "instruction"),
        ({"prompt": [AGAIN]}, "prompt"),
        ({"input": "Other"}, "input"),
        ({"history": [["a", "b"]]}, "history"),
    ],
)
def test_columns_that_are_not_in_the_messages_are_refused(extra: Any, name: str) -> None:
    said = reason({"messages": [ASKED, SAID, AGAIN, LATER], **extra})
    assert "'messages'" in said
    assert f"'{name}'" in said
    assert read({"messages": [ASKED, SAID], **extra}, ignore=[name])["response"] == "Hello"


def test_turns_as_prompt_and_completion() -> None:
    """TRL's conversational form: only the completion is learned."""
    assert read({"prompt": [ASKED], "completion": [SAID]})["response"] == "Hello"
    assert read({"prompt": [ASKED], "completion": "Hello"})["instruction"] == "Hi"
    assert read({"prompt": "Hi", "completion": [SAID]})["instruction"] == "Hi"
    assert read({"prompt": json.dumps([ASKED]), "completion": json.dumps([SAID])})["instruction"] == "Hi"
    values = Values(
        {"prompt": [ASKED, SAID, AGAIN], "completion": [LATER]},
        {"instruction": ("prompt",), "response": ("completion",)},
    )
    assert join_turns(values).pick("messages") == [ASKED, {**SAID, "weight": 0}, AGAIN, LATER]


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({"prompt": [ASKED]}, ["'response'", "GRPO"]),
        ({"completion": [SAID]}, ["'instruction'", "'completion'"]),
        ({"prompt": "Hi", "ground_truth": "x"}, ["'response'", "ground_truth"]),
        ({"prompt": [ASKED], "completion": [SAID], "context": "c"}, ["'prompt'", "'context'"]),
        ({"prompt": [ASKED], "completion": 3}, ["'completion'", "3"]),
        ({"message_tree_id": "a", "parent_id": None, "text": "t", "role": "prompter"}, ["'message_tree_id'", "OASST"]),
        ({"message_tree_id": "a", "prompt": {"text": "t", "replies": []}}, ["'message_tree_id'", "messages"]),
        ({"parent_id": "b", "text": "t", "role": "assistant"}, ["'parent_id'", "OASST"]),
        ({**PLAIN, "images": ["a.png"]}, ["'images'", "columns.ignore"]),
        ({"data": [{"instruction": "i"}]}, ["'instruction'", "'data' holds the rows"]),
        ({"instruction": {"0": "i"}, "response": {"0": "r"}}, ["'instruction'", '{"0": "i"}']),
    ],
)
def test_rows_of_other_formats_are_named(row: Any, facts: list[str]) -> None:
    assert all(fact in reason(row) for fact in facts), reason(row)


def test_other_labels_and_scores_are_passed_over() -> None:
    reader = RowReader(Columns())
    reader({**PLAIN, "label": 1, "score": 0.5, "chosen": None, "images": [], "parent_id": "x"})
    assert reader.ignored == {"label": 1, "score": 1, "parent_id": 1}


@pytest.mark.parametrize(
    ("value", "category"),
    [
        (float("nan"), ""),
        (None, ""),
        ("nan", ""),
        ("NaN", ""),
        (1.0, "1"),
        (1, "1"),
        (1.5, "1.5"),
        (-2.0, "-2"),
        ("1.0", "1.0"),
    ],
)
def test_categories_that_are_numbers_or_missing(value: Any, category: str) -> None:
    assert read({**PLAIN, "category": value})["category"] == category


@pytest.mark.parametrize("value", [True, False, [1], {"a": 1}])
def test_category_that_is_no_text_is_refused(value: Any) -> None:
    assert "'category'" in reason({**PLAIN, "category": value})


def test_missing_numbers_of_a_table(tmp_path: Path) -> None:
    """Integers with nulls are floats in pandas, and nulls NaN."""
    table = {"instruction": ["i"] * 3, "response": ["r"] * 3, "category": [1.0, float("nan"), None]}
    pq.write_table(pa.table({**table, "context": [float("nan")] * 3}), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet", out=tmp_path / "out")
    assert [row["category"] for row in rows] == ["1", "", ""]
    assert [row["context"] for row in rows] == [""] * 3
    assert "'response'" in reason({"instruction": "i", "response": float("nan")})


def test_parquet_struct_as_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"instruction": [{"text": "i"}], "response": ["r"]}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet", out=tmp_path / "out") == []
    assert "'instruction'" in quarantined(tmp_path / "out")[0]["reason"]


@pytest.mark.parametrize(
    ("columns", "setting", "value"),
    [
        ({"instruction": "question", "context": "article"}, "columns.context", "'article'"),
        ({"instruction": "quest"}, "columns.instruction", "'quest'"),
        ({"context": "context"}, "columns.context", "'context'"),
        ({"category": "topic"}, "columns.category", "'topic'"),
        ({"ignore": ["nothing"]}, "columns.ignore", "'nothing'"),
    ],
)
def test_a_mapped_column_that_no_row_has_is_an_error(tmp_path: Path, columns: Any, setting: str, value: str) -> None:
    row = {"question": "q", "answer": "a", "passage": "p"}
    with pytest.raises(DataError) as error:
        statistics(tmp_path, {"a.jsonl": [row], "b.jsonl": [row]}, **columns)
    for fact in ("raw_data.yaml", f"{setting} ", value, "question, answer, passage"):
        assert fact in str(error.value)


def test_a_mapped_column_that_some_files_lack_is_listed(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a"}
    files = {"a.jsonl": [row], "b.jsonl": [{**row, "article": ""}], "c.jsonl": [[1]]}
    counts = statistics(tmp_path, files, context="article")
    assert counts.rows == 2
    assert counts.files_without_column == {"article": ["a.jsonl"]}
    assert statistics(tmp_path, {"a.jsonl": [[1]]}, context="article").quarantined == 1, "no row at all"


def test_ignored_columns_are_counted_over_all_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"a.jsonl": [{**PLAIN, "notes": "n", "id": i} for i in range(3)], "b.jsonl": [{**PLAIN, "id": 0, "x": ""}]}
    with caplog.at_level("INFO"):
        assert statistics(tmp_path, files).ignored_columns == {"id": 4, "notes": 3}
    assert "notes (3 rows)" in caplog.text
    assert statistics(tmp_path, {"a.jsonl": [PLAIN]}).ignored_columns == {}


def test_keys_that_are_data_take_little_memory(tmp_path: Path) -> None:
    rows = [{**PLAIN, f"key {i}": i + 1} for i in range(3_000)] + [{**PLAIN, "topic": "t"}]
    counts = statistics(tmp_path, {"a.jsonl": rows}, category="topic")
    assert (counts.rows, counts.categories) == (3_001, {"": 3_000, "t": 1})
    assert counts.ignored_columns["other columns"] == 2_000
    assert len(counts.ignored_columns) == 100


def test_the_file_with_most_bad_rows_leads(tmp_path: Path) -> None:
    bad = {"instruction": "i", "response": 3}
    files = {
        "a.jsonl": [bad] * 10 + [PLAIN] * 690,
        "b.jsonl": [PLAIN] * 80,
        "c.jsonl": [bad] * 60,
        "d.jsonl": [bad, PLAIN],
    }
    counts = statistics(tmp_path, files)
    assert counts.quarantined_by_file == {"c.jsonl": (60, 60), "d.jsonl": (1, 2), "a.jsonl": (10, 700)}
    assert [*counts.quarantined_by_file] == ["c.jsonl", "d.jsonl", "a.jsonl"]
    shown = [(row["file"], row["line"]) for row in counts.first_quarantined]
    assert shown == [("c.jsonl", 1), ("c.jsonl", 2), ("d.jsonl", 1), ("a.jsonl", 1), ("a.jsonl", 2)]
    assert counts.files_without_rows == ["c.jsonl"]
