"""Raw data from Hub datasets: the real `datasets` and `huggingface_hub` clients against a Hub of ours."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from raw import quarantined
from servers.hub import TOKEN, Hub

from finetune_assets.artifacts.kinds import RAW
from finetune_assets.config.raw_data_schema import Columns, HubDataset, RawDataConfig
from finetune_assets.data.errors import DataError
from finetune_assets.data.ingest import PARQUET, write_raw
from finetune_assets.sources.hub import DamagedDownload
from finetune_assets.sources.raw_data import open_source
from finetune_assets.sources.source import SourceContext

NAME = "datasets/owner/rows"


def lines(*answers: str) -> bytes:
    return "".join(json.dumps({"instruction": "Say it.", "response": answer}) + "\n" for answer in answers).encode()


def parquet(*answers: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"question": ["q"] * len(answers), "answer": list(answers)}), sink)
    return sink.getvalue()


def config(revision: str = "", subset: str | None = None, split: str = "train", **columns: str) -> RawDataConfig:
    return RawDataConfig(
        source=f"hf://{NAME}" + (f"@{revision}" if revision else ""),
        hub=HubDataset(subset, split),
        columns=Columns(**columns),
    )


def answers(config: RawDataConfig, out: Path) -> list[str]:
    out.mkdir(exist_ok=True)
    write_raw(open_source(SourceContext(config, out)).files(), config.columns, out)
    return pq.read_table(out / PARQUET)["response"].to_pylist()


def test_branch_and_commit(hub: Hub, tmp_path: Path) -> None:
    old = hub.add(NAME, {"train.jsonl": lines("a", "b"), "README.md": b"# Rows"})
    hub.add(NAME, {"train.jsonl": lines("c")})
    hub.add(NAME, {"train.jsonl": lines("d")}, branch="try")
    assert answers(config(), tmp_path / "main") == ["c"]
    assert answers(config(old), tmp_path / "old") == ["a", "b"]
    assert answers(config("try"), tmp_path / "try") == ["d"]


def test_commit_needs_no_hub_to_be_named_and_a_moved_branch_is_other_data(hub: Hub, tmp_path: Path) -> None:
    def identity(config: RawDataConfig) -> str:
        return RAW.fingerprint(config, content=open_source(SourceContext(config, tmp_path)).content())

    old = hub.add(NAME, {"train.jsonl": lines("a")})
    before = identity(config())
    assert identity(config(old)) == before
    hub.add(NAME, {"train.jsonl": lines("b")})
    assert identity(config()) != before
    assert identity(config(old, split="test")) != before
    hub.requests.clear()
    identity(config(old))
    assert hub.requests == []


def test_splits_and_subsets_as_the_dataset_card_says(hub: Hub, tmp_path: Path) -> None:
    card = b"""---
configs:
- config_name: plain
  default: true
  data_files:
  - {split: train, path: plain/*.parquet}
- config_name: chat
  data_files:
  - {split: train, path: chat/a.jsonl}
  - {split: test, path: chat/b.jsonl}
---
# Rows
"""
    files = {"README.md": card, "plain/0.parquet": parquet("p0"), "plain/1.parquet": parquet("p1")}
    hub.add(NAME, {**files, "chat/a.jsonl": lines("a"), "chat/b.jsonl": lines("b")})
    assert answers(config(instruction="question", response="answer"), tmp_path / "1") == ["p0", "p1"]
    assert answers(config(subset="chat"), tmp_path / "2") == ["a"]
    assert answers(config(subset="chat", split="test"), tmp_path / "3") == ["b"]
    with pytest.raises(DataError, match=r"'dev'.*train, test"):
        answers(config(subset="chat", split="dev"), tmp_path / "4")
    with pytest.raises(DataError, match=r"hub\.subset speech: .*plain.*chat"):
        answers(config(subset="speech"), tmp_path / "5")


def test_bad_rows_are_told_by_file_and_line(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, {"data/train.jsonl": lines("a") + b"{oops\n" + lines("b")})
    assert answers(config(), tmp_path) == ["a", "b"]
    (bad,) = quarantined(tmp_path)
    assert (bad["file"], bad["line"]) == ("data/train.jsonl", 2)


def test_files_that_are_no_part_of_the_split_are_listed(hub: Hub, tmp_path: Path) -> None:
    files = {"data/train.jsonl": lines("a"), "data/test.jsonl": lines("b"), "notes.txt": b"x", "README.md": b"# Rows"}
    hub.add(NAME, {**files, ".gitattributes": b""})
    source = open_source(SourceContext(config(), tmp_path))
    assert [file.name for file in source.files()] == ["data/train.jsonl"]
    assert sorted(source.ignored_files()) == ["README.md", "data/test.jsonl", "notes.txt"]


def test_compressed_rows_are_read(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, {"train.jsonl.gz": gzip.compress(lines("a", "b"))})
    assert answers(config(), tmp_path) == ["a", "b"]


def test_gated_dataset_says_what_to_do_and_opens_with_a_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(NAME, {"train.jsonl": lines("a")}, gated=True)
    for revision in ("", commit):
        with pytest.raises(DataError, match=r"owner/rows.*HF_TOKEN"):
            answers(config(revision), tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert answers(config(), tmp_path) == ["a"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        ("hf://datasets/owner/gone", "owner/gone"),
        ("hf://datasets/owner/rows@v9", "owner/rows@v9"),
        ("hf://datasets/owner/rows@" + "0" * 40, "owner/rows.*0{7}"),
    ],
)
def test_missing_dataset_or_revision_is_named(hub: Hub, tmp_path: Path, source: str, facts: str) -> None:
    hub.add(NAME, {"train.jsonl": lines("a")})
    with pytest.raises(DataError, match=facts):
        open_source(SourceContext(RawDataConfig(source=source), tmp_path)).files()


@pytest.mark.parametrize(
    ("files", "facts"),
    [
        ({"rows.py": b"x", "README.md": b"# Rows"}, r"rows\.py"),
        ({"README.md": b"# Rows"}, "owner/rows"),
        ({"train.txt": b"text"}, r"train\.txt.*\.jsonl"),
        ({"state.json": b"{}", "dataset_info.json": b"{}", "data-0.arrow": b"x"}, "save_to_disk"),
    ],
)
def test_dataset_without_rows_that_we_read_is_told(
    hub: Hub, tmp_path: Path, files: dict[str, bytes], facts: str
) -> None:
    hub.add(NAME, files)
    with pytest.raises(DataError, match=facts):
        answers(config(), tmp_path)


def test_throttled_hub_is_waited_for_or_told(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, {"train.jsonl": lines("a")})
    source = open_source(SourceContext(config(), tmp_path))
    hub.failing, hub.failures_left = 429, 2
    assert len(source.files()) == 1
    hub.failing, hub.failures_left = 429, None
    with pytest.raises(DataError, match="429"):
        open_source(SourceContext(config(), tmp_path))


def test_cut_download_goes_on_where_it_was_cut(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    many = [f"{i} " + "x" * 500 for i in range(1_000)]
    hub.add(NAME, {"train.jsonl": lines(*many)})
    hub.cut_after = 300_000
    assert answers(config(), tmp_path) == many
    assert any("train.jsonl bytes=" in request for request in hub.requests)


def test_damaged_download_is_fetched_again_or_told(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, {"train.jsonl": lines("a")})
    hub.damaged["train.jsonl"] = 1
    assert answers(config(), tmp_path) == ["a"]
    hub.add(NAME, {"train.jsonl": lines("b")})
    hub.damaged["train.jsonl"] = 9
    with pytest.raises(DamagedDownload, match=r"train\.jsonl"):
        answers(config(), tmp_path)


def test_unreachable_hub_is_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9"):
        open_source(SourceContext(config(), tmp_path))
