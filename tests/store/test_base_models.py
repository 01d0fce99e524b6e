"""Base models from the package, a folder, and the real Hub client against a Hub of ours."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from servers import hub as hub_server
from servers.hub import TOKEN, Hub

from finetune_assets.store.base_models import PACKAGED, BaseModelError, collect, is_tokenizer_file, locate

NAMES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setenv("HF_TOKEN", "")
        yield running


def files(**more: bytes) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in PACKAGED["demo-base"].iterdir()} | more


def test_packaged_model(tmp_path: Path) -> None:
    source = locate("demo-base", "main", tmp_path)
    assert source.repo == "packaged/demo-base"
    collect(source, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == NAMES


def test_folder_is_pinned_by_its_content(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "mine"))
    before = locate("./mine", "main", tmp_path)
    (folder / "notes.txt").write_text("not part of the model")
    assert locate(str(folder), "main", tmp_path) == before
    (folder / "generation_config.json").write_text("{}")
    assert locate("./mine", "main", tmp_path).revision != before.revision


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_incomplete_folder_is_told(tmp_path: Path, removed: str, words: str) -> None:
    folder = Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "mine"))
    (folder / removed).unlink()
    with pytest.raises(BaseModelError, match=words):
        locate("./mine", "main", tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "mine"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"pickled weights \(pytorch_model\.bin\).*safetensors"):
        locate("./mine", "main", tmp_path)


def test_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="does not exist"):
        locate("./gone", "main", tmp_path)


def test_hub_branch_is_pinned_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("owner/model", files(**{"pytorch_model.bin": b"x", "onnx/model.onnx": b"x"}))
    source = locate("owner/model", "main", tmp_path)
    assert (source.repo, source.revision) == ("owner/model", commit)
    collect(source, tmp_path)
    assert NAMES <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "model.safetensors").read_bytes() == files()["model.safetensors"]
    assert not any("pytorch_model.bin" in request or "onnx" in request for request in hub.requests)


def test_older_commit_stays_reachable(hub: Hub, tmp_path: Path) -> None:
    old = hub.add("owner/model", files())
    new = hub.add("owner/model", files(**{"generation_config.json": b"{}"}))
    assert locate("owner/model", old, tmp_path).revision == old
    assert locate("owner/model", "main", tmp_path).revision == new


def test_pinned_commit_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    hub.failing = 500
    assert locate("owner/model", "a" * 40, tmp_path).revision == "a" * 40
    assert hub.requests == []


def test_gated_model_says_what_to_do_and_opens_with_a_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/gated", files(), gated=True)
    with pytest.raises(BaseModelError, match=r"gated.*owner/gated.*HF_TOKEN"):
        locate("owner/gated", "main", tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    collect(locate("owner/gated", "main", tmp_path), tmp_path)
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("owner/gone", "main", r"not on the Hub.*\./owner/gone"),
        ("demo-bsae", "main", "did you mean 'demo-base'"),
        ("owner/model", "v9", "no such branch, tag or commit"),
        ("not a name!", "main", "not on the Hub"),
    ],
)
def test_unknown_model_or_revision_is_told(hub: Hub, tmp_path: Path, name: str, revision: str, words: str) -> None:
    hub.add("owner/model", files())
    with pytest.raises(BaseModelError, match=words):
        locate(name, revision, tmp_path)


def test_hub_with_pickled_weights_only_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    repo = files()
    repo["pytorch_model.bin"] = repo.pop("model.safetensors")
    hub.add("owner/pickled", repo)
    with pytest.raises(BaseModelError, match="pickled weights"):
        collect(locate("owner/pickled", "main", tmp_path), tmp_path)
    assert not any("/resolve/" in request for request in hub.requests)


def test_failing_and_unreachable_hub_are_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failing = 500
    with pytest.raises(BaseModelError, match="refused \\(500\\)"):
        locate("owner/model", "main", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BaseModelError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        locate("owner/model", "main", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE"):
        locate("owner/model", "main", tmp_path)


def test_what_the_tokenizer_is_read_from() -> None:
    assert [is_tokenizer_file(name) for name in ("tokenizer.json", "spiece.model", "model.safetensors")] == [
        True,
        True,
        False,
    ]
