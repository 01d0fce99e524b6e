"""The asset `dolly_raw` lists what it did not read, and its checks name the file with the most bad rows."""

import json
from pathlib import Path

import pytest
from integration.graph import Graph
from projects import TestProject

from finetune_assets.data.processes import Processes

GOOD = [{"question": f"Question {i}?", "answer": f"Answer {i}.", "context_id": i, "notes": "n"} for i in range(120)]


@pytest.fixture
def inbox(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project.root / "inbox"
    folder.mkdir()
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(folder))
    return folder


def write(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_ignored_columns_and_files_are_listed_also_where_the_rows_are_known(inbox: Path) -> None:
    write(inbox / "a.jsonl", *GOOD)
    (inbox / "old.xlsx").write_text("x")
    graph = Graph()
    run = graph.run(["dolly_raw"], None)
    metadata = run.metadata("dolly_raw")
    assert run.success
    assert "| notes | 120 |" in metadata["ignored_columns"]
    assert "| context_id | 120 |" in metadata["ignored_columns"]
    assert "old.xlsx" in metadata["ignored_files"]
    assert "notes (120 rows)" in run.log
    assert "old.xlsx" in run.log
    (inbox / "old.xlsx").rename(inbox / "new.xlsx")
    again = graph.run(["dolly_raw"], None)
    metadata = again.metadata("dolly_raw")
    assert metadata["cache_hit"]
    assert "new.xlsx" in metadata["ignored_files"]
    assert "old.xlsx" not in metadata["ignored_files"]
    assert "| notes | 120 |" in metadata["ignored_columns"]


def test_nothing_is_listed_where_everything_is_read(inbox: Path) -> None:
    write(inbox / "a.jsonl", *({"question": row["question"], "answer": row["answer"]} for row in GOOD))
    metadata = Graph().run(["dolly_raw"], None).metadata("dolly_raw")
    assert not [key for key in metadata if key.startswith(("ignored_", "files_without"))]


def test_quarantine_names_the_file_with_the_most_bad_rows_first(inbox: Path) -> None:
    bad = {"question": "Why?", "answer": 3}
    write(inbox / "a.jsonl", bad, *GOOD[:100])
    write(inbox / "c.jsonl", *[bad] * 59, GOOD[100])
    run = Graph().run(["dolly_raw"], None)
    message = run.failures["dolly_raw"]
    assert not run.success
    assert "60 of 161 rows" in message
    assert message.index("c.jsonl 59 of 60") < message.index("a.jsonl 1 of 101") < message.index("c.jsonl:1:")


@pytest.mark.parametrize("count", [1, 2])
def test_the_number_of_processes_is_that_of_the_configuration(
    project: TestProject, inbox: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(inbox / "a.jsonl", *GOOD)
    with (project.configs / "raw_data.yaml").open("a") as raw:
        raw.write(f"\nprocesses: '{count}'\n")
    used: list[int] = []
    create = Processes.__init__

    def counted(processes: Processes, count: int, setting: str) -> None:
        used.append(count)
        create(processes, count, setting)

    monkeypatch.setattr(Processes, "__init__", counted)
    assert Graph().run(["dolly_raw"], None).success
    assert used == [count]
