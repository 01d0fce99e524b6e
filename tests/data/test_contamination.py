"""Training rows that contain text of an evaluation."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from raw import ingest

from finetune_assets.data.contamination import Contamination, contamination, read_documents, training_rows
from finetune_assets.data.errors import DataError
from finetune_assets.data.rows import Row

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness"


def row(instruction: str, response: str = "Yes.", messages: Any = None) -> Row:
    return {"instruction": instruction, "context": "", "response": response, "category": "", "messages": messages}


def test_rows_with_thirteen_words_of_a_text_are_counted_and_named() -> None:
    words = TEXT.split()
    turns = [{"role": "user", "content": "Go on"}, {"role": "assistant", "content": TEXT.upper()}]
    rows = [
        row("Who?"),
        row(f"Who wrote: {' '.join(words[3:16])}?"),
        row(f"Who wrote: {' '.join(words[3:15])}?"),
        row(" ".join(words[:7]), " ".join(words[7:14])),
        row("Go on", "x", turns),
    ]
    found = contamination(enumerate(rows, 10), ["A short one.", "other words " * 10, TEXT])
    assert found == Contamination(rows=2, first=[(11, 2), (14, 2)], texts=3, short_texts=1, searched=5)


def test_fewer_words_on_request() -> None:
    assert contamination([(0, row("the worst of times"))], [TEXT], n=4).rows == 1
    assert contamination([(0, row("the worst of days"))], [TEXT], n=4).rows == 0


def test_each_contaminated_row_counts_once_in_any_number_of_batches() -> None:
    found = contamination(((i, row(TEXT, TEXT)) for i in range(3_000)), [TEXT, TEXT])
    assert (found.rows, found.searched) == (3_000, 3_000)
    assert found.first == [(i, 0) for i in range(5)]


def test_no_texts() -> None:
    assert contamination([(0, row("Who?"))], []) == Contamination()


def test_training_rows_are_those_of_the_split(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": f"q{i}", "response": "a"}) for i in range(2_500)))
    table = pa.table({"row": pa.array([2_400, 7, 1_200], pa.int64())})
    with pa.ipc.new_stream(str(tmp_path / "train.arrow"), table.schema) as writer:
        writer.write_table(table)
    rows = list(training_rows([ingest(tmp_path / "raw", path)], tmp_path / "train.arrow"))
    assert sorted((number, row["instruction"]) for number, row in rows) == [
        (7, "q7"),
        (1_200, "q1200"),
        (2_400, "q2400"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        (
            "a.jsonl",
            '{"q": "Who?", "choices": ["Me", "You"], "gold": 1}\n\n{"q": "a\u2028b"}\n',
            ["Who? Me You", "a\u2028b"],
        ),
        ("a.json", '[{"q": "Who?"}, "Why?"]', ["Who?", "Why?"]),
        ("a.json", '{"q": {"text": "Who?"}}', ["Who?"]),
        ("a.csv", 'q,a\n"Who\nis it?",Me\n', ["q a", "Who\nis it? Me"]),
    ],
)
def test_documents_of_tasks(tmp_path: Path, name: str, content: str, documents: list[str]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_documents(tmp_path / name) == documents


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b"{"), ("a.json", b"["), ("a.json", b"\xff\xfe\xfa")])
def test_unreadable_documents_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_documents(tmp_path / name)
