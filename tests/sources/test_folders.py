"""Folders and S3 prefixes: what is read once, what is listed as ignored, and what is refused."""

from pathlib import Path

import pytest
from servers.s3 import Bucket

from finetune_assets.config.raw_data_schema import RawDataConfig
from finetune_assets.data.errors import DataError
from finetune_assets.sources.raw_data import open_source
from finetune_assets.sources.source import Source, SourceContext

SAVED = {
    "one split": ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"],
    "several splits": ["dataset_dict.json", "train/data-00000-of-00001.arrow"],
    "a folder in it": ["rows.jsonl", "old/state.json", "old/dataset_info.json", "old/data-00000-of-00001.arrow"],
}


def opened(source: str | Path, root: Path, bucket: Bucket | None = None) -> Source:
    connect = (lambda: bucket.client) if bucket else None
    return open_source(
        SourceContext(RawDataConfig(source=str(source)), root, connect=connect, downloads=root / "cache")
    )


def names(source: Source) -> list[str]:
    return [file.name for file in source.files()]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "deep/c.csv"):
        (folder / name).write_text("x")
    return folder


def test_every_other_file_is_listed(rows: Path) -> None:
    read = ("a.jsonl.gz", "a.ndjson", "a.tsv", "a.csv.zst", "A.ARROW", "a.json.gz")
    for name in (*read, "notes.txt", "a.xlsx", "a.parquet.gz", "_SUCCESS", "deep/README.md", ".hidden.txt"):
        (rows / name).write_text("x")
    source = opened(rows, rows)
    assert sorted(names(source)) == sorted([*read, "b.jsonl", "deep/c.csv"])
    assert sorted(source.ignored_files()) == ["_SUCCESS", "a.parquet.gz", "a.xlsx", "deep/README.md", "notes.txt"]


def test_other_files_are_no_part_of_the_identity(rows: Path) -> None:
    before = opened(rows, rows).content()
    (rows / "notes.txt").write_text("x")
    assert opened(rows, rows).content() == before
    assert [ending for ending, _ in before] == [".jsonl", ".csv"]


def test_a_linked_folder_is_read_once(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_text("y")
    (rows / "linked").symlink_to(tmp_path / "elsewhere")
    (rows / "again").symlink_to(tmp_path / "elsewhere")
    (rows / "around").symlink_to(rows)
    (rows / "deep" / "up").symlink_to(rows / "deep")
    (rows / "also_deep").symlink_to(rows / "deep")
    assert names(opened(rows, rows)) == ["again/a.jsonl", "b.jsonl", "deep/c.csv"]


def test_a_file_behind_several_names_is_read_once_and_listed(rows: Path) -> None:
    (rows / "a.jsonl").symlink_to("b.jsonl")
    (rows / "deep" / "d.jsonl").symlink_to("../b.jsonl")
    (rows / "e.jsonl").write_text("x")
    source = opened(rows, rows)
    assert names(source) == ["b.jsonl", "deep/c.csv", "e.jsonl"], "the same bytes in another file are rows"
    assert [name.split()[0] for name in source.ignored_files()] == ["a.jsonl", "deep/d.jsonl"]
    assert all("b.jsonl" in name for name in source.ignored_files())


def test_links_into_hidden_folders_are_followed(rows: Path) -> None:
    """As Kubernetes mounts a ConfigMap, and the Hub's cache keeps its snapshots."""
    (rows / "..data").mkdir()
    (rows / "..data" / "a.jsonl").write_text("x")
    (rows / "a.jsonl").symlink_to("..data/a.jsonl")
    assert names(opened(rows, rows)) == ["a.jsonl", "b.jsonl", "deep/c.csv"]


def test_a_broken_link_is_named(rows: Path) -> None:
    (rows / "notes.txt").symlink_to("gone.txt")
    (ignored,) = opened(rows, rows).ignored_files()
    assert ignored.startswith("notes.txt ")
    (rows / "gone.jsonl").symlink_to("/nowhere/a.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl.*/nowhere/a\.jsonl"):
        opened(rows, rows)


@pytest.mark.parametrize("files", SAVED.values(), ids=SAVED)
def test_a_folder_of_save_to_disk_is_named(tmp_path: Path, files: list[str], moto: Bucket) -> None:
    for name in files:
        (tmp_path / "saved" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "saved" / name).write_text("{}")
        moto.put(f"saved/{name}", b"{}")
    with pytest.raises(DataError, match=r"save_to_disk.*to_json"):
        opened(tmp_path / "saved", tmp_path)
    with pytest.raises(DataError, match=r"save_to_disk.*to_json"):
        opened(f"s3://{moto.name}/saved", tmp_path, moto).files()


def test_an_arrow_file_of_save_to_disk_is_named(tmp_path: Path) -> None:
    for name in SAVED["one split"]:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match="save_to_disk"):
        opened("data-00000-of-00001.arrow", tmp_path)


def test_a_prefix_is_a_folder_or_an_object(tmp_path: Path, moto: Bucket) -> None:
    for key in (
        *("rows/a.jsonl", "rows/deep/b.csv", "rows/.hidden.jsonl", "rows/notes.txt", "rows/"),
        *(
            "rows-old/c.jsonl",
            "rows2/d.jsonl",
            "rows_rejected.jsonl",
            "rows.jsonl",
            "rows.jsonl.gz",
            "rows.jsonl.d/e.csv",
        ),
        *(".private/f.jsonl", "both.csv", "both.csv/part-0.csv"),
    ):
        moto.put(key, key.encode())

    def read(place: str) -> tuple[list[str], list[str], list[str]]:
        source = opened(f"s3://{moto.name}{place}", tmp_path, moto)
        files = source.files()
        assert len(source.content()) == len(files)
        return [file.name for file in files], [file.path.read_text() for file in files], [*source.ignored_files()]

    folder = (["a.jsonl", "deep/b.csv"], ["rows/a.jsonl", "rows/deep/b.csv"], ["notes.txt"])
    assert read("/rows") == read("/rows/") == folder
    assert read("/rows.jsonl") == (["rows.jsonl"], ["rows.jsonl"], [])
    assert read("/rows/deep") == (["b.csv"], ["rows/deep/b.csv"], [])
    assert read("/.private")[0] == ["f.jsonl"], "hidden is what is hidden in the folder"
    assert read("/both.csv/")[0] == ["part-0.csv"]
    assert read("/rows.jsonl.d")[0] == ["e.csv"]
    assert len(read("")[0]) == len(read("/")[0]) == 10
    with pytest.raises(DataError, match=r"both\.csv"):
        read("/both.csv")
    for nothing in ("/row", "/rows-", "/rows/a", "/rows/a.json"):
        with pytest.raises(DataError, match=rf"s3://{moto.name}{nothing}'"):
            read(nothing)
