"""The text by which forgetting is measured, as people bring it."""

from pathlib import Path

import pytest

from finetune_assets.data.errors import DataError
from finetune_assets.data.texts import read_texts


def test_paragraphs_and_json_lines_of_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffOne.\nStill one.\n\n\n  Two.  \n".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "Three.", "more": 1}\n\n{"text": " "}\n', encoding="utf-8")
    (tmp_path / "c.md").write_text("not read")
    assert read_texts(tmp_path / "a.txt") == ["One.\nStill one.", "Two."]
    assert read_texts(tmp_path) == ["One.\nStill one.", "Two.", "Three."]


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', ["a.jsonl:2", "txt"]),
        ("a.jsonl", b'{"text": 3}\n', ["a.jsonl:1"]),
        ("a.jsonl", b"{oops\n", ["a.jsonl:1", "oops"]),
        ("a.txt", b"caf\xe9", ["a.txt", "byte 3"]),
        ("a.txt", b"\n \n", ["a.txt"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, facts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_texts(tmp_path / name)
    for fact in ("evaluation.general_text", *facts):
        assert fact in str(error.value)
