"""Data that several processes prepare: every file, statistic and error is that of one process."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from data.test_chat import chat_data
from data.test_chat_tools import ASKED, CALLED, RESULT, SAID, TOOLS, tokenizer_with
from data.tool_chats import QWEN25
from planted import PLANTED
from raw import ingest
from tiers import tiered
from tokenizers import NormalizedString, PreTokenizedString
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerBase

from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.config.schema import Data, PromptTemplate, Tokenization
from finetune_assets.data import encoding, processes, selection
from finetune_assets.data import ingest as ingestion
from finetune_assets.data.errors import DataError
from finetune_assets.data.ingest import write_raw
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.raw_files import RawPart
from finetune_assets.data.readers import SourceFile
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE

SHORT = PromptTemplate(
    prompt_input="{context} {instruction} R:", prompt_no_input="{instruction} R:", response_split="R:"
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 37 rows, so that each process gets several."""
    monkeypatch.setattr(selection, "ROWS_PER_BATCH", 37)
    monkeypatch.setattr(selection, "DRAWN_PER_BATCH", 37)
    monkeypatch.setattr(ingestion, "ROWS_PER_BATCH", 90)
    monkeypatch.setattr(ingestion, "INSPECTED_ROWS", 37)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of processes that have been started, as the length of a list."""
    pids: list[int] = []
    start = processes._Child.__init__

    def counted(child: Any, *arguments: Any) -> None:
        start(child, *arguments)
        pids.append(child._process.pid)

    monkeypatch.setattr(processes._Child, "__init__", counted)
    return pids


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(str(PACKAGED["demo-base"]))


def prepared(rows: Any, tokenizer: PreTrainedTokenizerBase, data: Data, out: Path, count: str) -> dict[str, Any]:
    """All files and statistics."""
    out.mkdir()
    data.processes = count
    statistics = prepare_dataset(rows, tokenizer, data, "salt", out)
    return {path.name: path.read_bytes() for path in out.iterdir()} | {"statistics": json.dumps(statistics.to_dict())}


def conversations(folder: Path) -> Path:
    """Conversations with tools, with parts that are left out; every tenth begins with a turn that is refused."""
    turns = [{**ASKED, "name": "Ann"}, CALLED, RESULT, {**SAID, "weight": 0.0}, ASKED, SAID]
    rows = [
        {
            "messages": [{**turns[0], "content": f"Weather {i}?"}, *turns[1:]],
            "tools": TOOLS,
            "category": f"kind {i % 3}",
        }
        for i in range(200)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ingest(folder / "raw", folder / "rows.jsonl", SAMPLE)


def test_rows_of_weighted_sources_are_the_same(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, started: list[int]
) -> None:
    """Also those that are truncated, refused or without a label, and near-duplicates across the split."""
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    text = "The river rises in the hills above the town and flows for ninety miles to the sea, past mills. " * 4
    near = [json.dumps({"instruction": f"{text} {'x' * i}?", "response": f"{'y' * i}."}) for i in range(1, 61)]
    chat = json.dumps({"messages": [ASKED, SAID, ASKED, SAID]})
    (tmp_path / "other.jsonl").write_text("\n".join([*near, chat, *lines[::3], chat]), encoding="utf-8")
    parts = [
        RawPart("sample", ingest(tmp_path / "a", SAMPLE), weight=1.0, max_rows=500),
        RawPart("other", ingest(tmp_path / "b", tmp_path / "other.jsonl"), weight=0.4),
    ]
    data = Data(prompt_template=SHORT, tokenization=Tokenization(cutoff_len=24), val_fraction=0.2)
    one = prepared(parts, tokenizer, data, tmp_path / "one", "1")
    assert started == []
    two = prepared(parts, tokenizer, data, tmp_path / "two", "2")
    assert len(started) == 1
    assert one == two
    statistics = json.loads(one["statistics"])
    assert statistics["first_refused"].startswith("row 860 of dolly_raw: ")
    for name in ("refused", "truncated", "without_label", "near_duplicates_left_out"):
        assert statistics[name] > 0, name
    assert {*statistics["sources"]} == {"sample", "other"}
    assert "packs.arrow" in one


@pytest.mark.system
def test_conversations_of_a_chat_template_are_the_same(tmp_path: Path, started: list[int]) -> None:
    rows, tokenizer = conversations(tmp_path / "rows"), tokenizer_with(QWEN25)
    one, two = (prepared(rows, tokenizer, chat_data(cutoff=512), tmp_path / count, count) for count in ("1", "2"))
    assert len(started) == 1
    assert one == two
    assert json.loads(one["statistics"])["omitted"] == {
        "name of a turn with role user": 200,
        "name of a turn with role tool": 200,
    }


@pytest.mark.system
def test_few_rows_start_no_process_and_many_do(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ingest(tmp_path / "raw", SAMPLE)
    monkeypatch.setattr(processes, "available_cores", lambda: 3)
    few = prepared(rows, tokenizer, Data(), tmp_path / "few", "auto")
    assert started == []
    monkeypatch.setattr("finetune_assets.data.prepare.ROWS_PER_PROCESS", 200)
    assert prepared(rows, tokenizer, Data(), tmp_path / "many", "auto") == few
    assert len(started) == 2


class BySpaces:
    """A part of a tokenizer that is written in Python, and that no other process can have."""

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(lambda _, part: [*part.split(" ", "merged_with_next")])


@pytest.mark.system
def test_a_tokenizer_with_a_part_in_python_is_used_in_one_process(tmp_path: Path, started: list[int]) -> None:
    assert NormalizedString("a b").split(" ", "merged_with_next")
    tokenizer = load_tokenizer(str(PACKAGED["demo-base"]))
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(BySpaces())  # type: ignore[attr-defined]
    rows = ingest(tmp_path / "raw", SAMPLE)
    one, two = (prepared(rows, tokenizer, Data(), tmp_path / count, count) for count in ("1", "2"))
    assert one == two


def test_the_error_of_a_process_is_raised_and_no_file_is_left(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ingest(tmp_path / "raw", SAMPLE)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    errors = []
    for count in ("1", "2"):
        data = Data(prompt_template=PromptTemplate(prompt_no_input="{instruction} {missing}", response_split=""))
        with pytest.raises(KeyError) as error:
            prepared(rows, tokenizer, data, tmp_path / count, count)
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1] == (KeyError, "'missing'")
    assert [*(tmp_path / "temporary").iterdir()] == []
    assert {path.name for path in (tmp_path / "2").iterdir()} == {path.name for path in (tmp_path / "1").iterdir()}


@pytest.mark.parametrize("threshold", tiered([0.8, None], [0.8]))
def test_raw_rows_are_the_same(threshold: float | None, tmp_path: Path, started: list[int]) -> None:
    """Duplicates, near-duplicates, leaked answers, secrets and bad rows at the ends of batches, and conversations."""
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()[:300]
    answer = "The river rises in the hills above the town. " * 6
    planted = [json.dumps({"instruction": f"{i}?", "response": text}) for i, (_, text, _) in enumerate(PLANTED)]
    leak = json.dumps({"instruction": f"Repeat: {answer}", "response": answer})
    chat = json.dumps({"messages": [ASKED, CALLED, RESULT, SAID], "tools": TOOLS})
    near = json.dumps({"instruction": answer, "response": answer.replace("town", "old town", 1)})
    rows = [*lines, leak, "{", chat, *planted, near, *lines[::7], chat, near.replace("hills", "hill"), "[]"]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    written = []
    for count in ("1", "2"):
        (tmp_path / count).mkdir()
        files = [SourceFile("rows.jsonl", tmp_path / "rows.jsonl"), SourceFile("sample.jsonl", SAMPLE)]
        statistics = write_raw(files, Columns(), tmp_path / count, threshold, count)
        content = {path.name: path.read_bytes() for path in (tmp_path / count).iterdir()}
        written.append(content | {"statistics": json.dumps(asdict(statistics))})
        assert (statistics.quarantined, statistics.sensitive.rows > 5, statistics.quality.leaked) == (2, True, 1)
        assert statistics.quality.duplicates > 300
    assert written[0] == written[1]
    assert len(started) == 1


def test_the_error_of_a_file_that_cannot_be_read_is_the_same(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows)[:-30], encoding="utf-8")
    errors = []
    for count in ("1", "2"):
        (tmp_path / count).mkdir()
        with pytest.raises(DataError) as error:
            write_raw([SourceFile("rows.json", tmp_path / "rows.json")], Columns(), tmp_path / count, 0.8, count)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert "rows.json:1" in errors[0]


def test_the_examples_have_the_source_only_where_there_are_several() -> None:
    assert [field.name for field in encoding.example_schema(True)][-1] == "source"
    assert "source" not in encoding.example_schema(False).names
