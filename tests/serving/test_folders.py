"""A folder of adapters never shows half of one, and a name never gets other bytes."""

import json
import shutil
from pathlib import Path

import pytest

from finetune_assets.errors import UserError
from finetune_assets.serving.folders import ServingFolder
from finetune_assets.serving.state import Served


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_an_adapter_is_written_whole(tmp_path: Path, copy: Path) -> None:
    folder = ServingFolder(tmp_path / "deep" / "adapters")
    folder.load("demo-1-0123abcd", copy)
    target = folder.at("demo-1-0123abcd")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"weights",
    }
    assert folder.names() == ["demo-1-0123abcd"]
    assert [path.name for path in folder.path.iterdir()] == ["demo-1-0123abcd"]
    written = target.stat().st_mtime_ns
    folder.load("demo-1-0123abcd", copy)
    assert target.stat().st_mtime_ns == written


def test_a_failure_leaves_nothing(tmp_path: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = ServingFolder(tmp_path / "adapters"), []

    def full(source: Path, target: Path) -> None:
        seen.append(folder.names())
        Path(target).write_bytes(b"half")
        if len(seen) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        folder.load("demo-1-0123abcd", copy)
    assert seen[0] == [], "a server sees no adapter before it is whole"
    assert [*folder.path.iterdir()] == []


def test_a_name_never_gets_other_bytes(tmp_path: Path, copy: Path) -> None:
    folder = ServingFolder(tmp_path / "adapters")
    folder.load("demo-1-0123abcd", copy)
    target = folder.at("demo-1-0123abcd")
    (copy / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="demo-1-0123abcd"):
        folder.load("demo-1-0123abcd", copy)
    assert (target / "adapter_model.safetensors").read_bytes() == b"weights"
    folder.unload("demo-1-0123abcd")
    target.symlink_to(copy)
    with pytest.raises(UserError, match="demo-1-0123abcd"):
        folder.load("demo-1-0123abcd", copy)


def test_the_alias_is_a_file_of_its_own(tmp_path: Path) -> None:
    folder = ServingFolder(tmp_path / "adapters")
    record = Served("demo", "demo-1-0123abcd", "a" * 64, "adapters", "b" * 64, 1, at="now", number=4)
    folder.write_alias(record)
    alias = json.loads((folder.path / "demo.json").read_text())
    assert alias == {"serves": "demo-1-0123abcd", "previous": None, "adapter": "a" * 64, "record": 4, "at": "now"}
    assert {path.name for path in folder.path.iterdir()} == {"demo.json", "demo.gateway.yaml"}
    assert folder.names() == []
