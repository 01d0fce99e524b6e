"""Base models from the package, a folder, and the real Hub client against a Hub of ours."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from servers.hub import TOKEN, Hub

from finetune_assets.sources.base_models import (
    PACKAGED,
    BaseModelError,
    BaseModelSource,
    collect,
    is_tokenizer_file,
    locate,
)
from finetune_assets.sources.hub import DamagedDownload

NAMES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def files(**more: bytes) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in PACKAGED["demo-base"].iterdir()} | more


def collect_into(source: BaseModelSource, target: Path, trusted: bool = False) -> None:
    for name, path in collect(source, trusted)[0].items():
        shutil.copyfile(path, target / name)


def test_packaged_model(tmp_path: Path) -> None:
    source = locate("demo-base", "main", tmp_path)
    assert source.repo == "packaged/demo-base"
    collect_into(source, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == NAMES


def test_folder_is_pinned_by_its_content(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "mine"))
    before = locate("./mine", "main", tmp_path)
    (folder / "notes.txt").write_text("not part of the model")
    assert locate(str(folder), "main", tmp_path) == before
    (folder / "generation_config.json").write_text("{}")
    assert locate("./mine", "main", tmp_path).revision != before.revision


@pytest.mark.parametrize("removed", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_folder_is_refused(tmp_path: Path, removed: str) -> None:
    folder = Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "mine"))
    (folder / removed).unlink()
    with pytest.raises(BaseModelError, match=rf"{folder}.*{re.escape(removed)}"):
        locate("./mine", "main", tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "mine"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin.*model\.safetensors"):
        locate("./mine", "main", tmp_path)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=rf"model\.base_model.*{tmp_path}/gone"):
        locate("./gone", "main", tmp_path)


def test_hub_branch_is_pinned_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("owner/model", files(**{"pytorch_model.bin": b"x", "onnx/model.onnx": b"x"}))
    source = locate("owner/model", "main", tmp_path)
    assert (source.repo, source.revision) == ("owner/model", commit)
    collect_into(source, tmp_path)
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
    with pytest.raises(BaseModelError, match=rf"{hub.url}/owner/gated.*HF_TOKEN"):
        locate("owner/gated", "main", tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    collect_into(locate("owner/gated", "main", tmp_path), tmp_path)
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "revision", "facts"),
    [
        ("owner/gone", "main", r"owner/gone.*\./owner/gone"),
        ("demo-bsae", "main", "demo-bsae.*'demo-base'"),
        ("owner/model", "v9", "owner/model.*v9"),
        ("not a name!", "main", "not a name!"),
    ],
)
def test_unknown_model_or_revision_is_refused(hub: Hub, tmp_path: Path, name: str, revision: str, facts: str) -> None:
    hub.add("owner/model", files())
    with pytest.raises(BaseModelError, match=facts):
        locate(name, revision, tmp_path)


def test_hub_with_pickled_weights_only_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    repo = files()
    repo["pytorch_model.bin"] = repo.pop("model.safetensors")
    hub.add("owner/pickled", repo)
    with pytest.raises(BaseModelError, match=r"owner/pickled.*pytorch_model\.bin"):
        collect_into(locate("owner/pickled", "main", tmp_path), tmp_path)
    assert not any("/resolve/" in request for request in hub.requests)


def test_failing_and_unreachable_hub_are_refused(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failing = 500
    with pytest.raises(BaseModelError, match="500"):
        locate("owner/model", "main", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BaseModelError, match=r"http://127\.0\.0\.1:9"):
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


def sharded(where: Path) -> dict[str, bytes]:
    """The packaged model in several shards, as transformers saves it, beside files that training does not need."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(PACKAGED["demo-base"]).save_pretrained(where, max_shard_size="1MB")
    repo = {name: body for name, body in files().items() if name != "model.safetensors"}
    repo |= {path.name: path.read_bytes() for path in where.iterdir()}
    return repo | {"consolidated.safetensors": b"x", "modeling_other.py": b"raise SystemExit"}


def test_sharded_model_is_fetched_whole_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    repo = sharded(tmp_path / "shards")
    shards = {name for name in repo if name.startswith("model-0")}
    assert len(shards) > 2
    hub.add("owner/sharded", repo)
    out = tmp_path / "out"
    out.mkdir()
    collect_into(locate("owner/sharded", "main", tmp_path), out)
    assert {path.name for path in out.iterdir()} == (NAMES - {"model.safetensors"}) | shards | {
        "model.safetensors.index.json"
    }
    assert all((out / name).read_bytes() == repo[name] for name in shards)
    assert not any("consolidated" in request or "modeling_other" in request for request in hub.requests)


def test_missing_shard_is_refused_before_any_is_fetched(hub: Hub, tmp_path: Path) -> None:
    repo = sharded(tmp_path / "shards")
    gone = max(name for name in repo if name.startswith("model-0"))
    del repo[gone]
    hub.add("owner/sharded", repo)
    with pytest.raises(BaseModelError, match=re.escape(gone)):
        collect_into(locate("owner/sharded", "main", tmp_path), tmp_path)
    assert not any("model-0" in request for request in hub.requests)


def test_cut_download_goes_on_where_it_was_cut(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 18)  # the client keeps whole chunks, of 10 MiB
    hub.add("owner/model", files())
    hub.cut_after = 1_500_000
    collect_into(locate("owner/model", "main", tmp_path), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == files()["model.safetensors"]
    assert [r for r in hub.requests if "model.safetensors bytes=" in r], "by ranges"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "model.safetensors"])
def test_damaged_file_is_fetched_again(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.add("owner/model", files())
    hub.damaged[name] = 1
    collect_into(locate("owner/model", "main", tmp_path), tmp_path)
    assert (tmp_path / name).read_bytes() == files()[name]
    hub.add("owner/other", files())
    hub.damaged[name] = 10
    with pytest.raises(DamagedDownload, match=re.escape(name)):
        collect_into(locate("owner/other", "main", tmp_path), tmp_path)


def test_file_that_was_damaged_in_the_clients_cache_is_noticed(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/model", files())
    source = locate("owner/model", "main", tmp_path)
    collect_into(source, tmp_path)
    (cached,) = (tmp_path / "hub_home").rglob("snapshots/*/model.safetensors")
    body = bytearray(cached.read_bytes())
    body[-1] ^= 1
    cached.resolve().write_bytes(body)
    collect_into(source, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == files()["model.safetensors"]


def test_throttled_hub_is_waited_for_and_then_named(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/model", files())
    source = locate("owner/model", "main", tmp_path)
    hub.failing, hub.failures_left = 429, 2
    collect_into(source, tmp_path)
    hub.failing, hub.failures_left = 429, None
    with pytest.raises(BaseModelError, match=r"429.*HF_TOKEN"):
        locate("owner/model", "main", tmp_path)


def test_refused_token_is_refused(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/model", files())
    hub.failing = 401
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(BaseModelError, match=r"HF_TOKEN.*401"):
        locate("owner/model", "main", tmp_path)
    hub.failing = None
    with pytest.raises(BaseModelError, match=r"owner/secret.*HF_TOKEN"):
        locate("owner/secret", "main", tmp_path)


def test_branch_and_commit(hub: Hub, tmp_path: Path) -> None:
    main = hub.add("owner/model", files())
    other = hub.add("owner/model", files(**{"generation_config.json": b"{}"}), branch="try")
    assert locate("owner/model", "try", tmp_path).revision == other
    assert locate("owner/model", "main", tmp_path).revision == main
    collect_into(locate("owner/model", other, tmp_path), tmp_path)
    assert (tmp_path / "generation_config.json").read_bytes() == b"{}"


def changed(change: dict[str, object], **more: bytes) -> dict[str, bytes]:
    config = json.loads(files()["config.json"]) | change
    return files(**{"config.json": json.dumps(config).encode()}, **more)


OWN_CODE = {"model_type": "brand_new", "auto_map": {"AutoModelForCausalLM": "modeling_new.NewForCausalLM"}}


def test_model_with_its_own_code_is_refused_until_this_version_is_trusted(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("owner/new", changed(OWN_CODE, **{"modeling_new.py": b"x = 1"}))
    source = locate("owner/new", "main", tmp_path)
    with pytest.raises(
        BaseModelError, match=rf"modeling_new\.NewForCausalLM.*model\.trust_remote_code.*owner/new@{commit}"
    ):
        collect_into(source, tmp_path)
    assert not any("model.safetensors" in request for request in hub.requests), "refused before the weights"
    collect_into(source, tmp_path, trusted=True)
    assert (tmp_path / "modeling_new.py").read_bytes() == b"x = 1"


def test_code_of_another_repository_is_refused_even_if_trusted(hub: Hub, tmp_path: Path) -> None:
    elsewhere = {**OWN_CODE, "auto_map": {"AutoModelForCausalLM": "someone/else--modeling_new.NewForCausalLM"}}
    hub.add("owner/new", changed(elsewhere))
    with pytest.raises(BaseModelError, match=r"someone/else--modeling_new"):
        collect_into(locate("owner/new", "main", tmp_path), tmp_path, trusted=True)


def test_code_that_transformers_has_itself_is_neither_needed_nor_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/llama", changed({"auto_map": OWN_CODE["auto_map"]}, **{"modeling_new.py": b"x = 1"}))
    collect_into(locate("owner/llama", "main", tmp_path), tmp_path)
    assert not (tmp_path / "modeling_new.py").exists()


def test_folder_with_its_own_code_is_named_by_its_content(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "mine"))
    (folder / "config.json").write_bytes(changed(OWN_CODE)["config.json"])
    (folder / "modeling_new.py").write_text("x = 1")
    source = locate("./mine", "main", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BaseModelError, match=rf"model\.trust_remote_code.*local/mine@{source.revision}"):
        collect_into(source, out)
    (folder / "modeling_new.py").write_text("x = 2")
    assert locate("./mine", "main", tmp_path).version != source.version, "other code is another version"


@pytest.mark.parametrize(
    ("repo", "facts"),
    [
        (files(**{"config.json": b"{oops"}), r"config\.json"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, r"config\.json.*adapter"),
        ({**files(), "model.safetensors": b"\0" * 100}, r"model\.safetensors"),
        (
            {"weights.safetensors" if n == "model.safetensors" else n: b for n, b in files().items()},
            r"weights\.safetensors",
        ),
        (files(**{"model.safetensors.index.json": b"[]"}), r"model\.safetensors\.index\.json"),
        (files(**{"model.safetensors.index.json": b"{}"}), r"model\.safetensors\.index\.json.*weight_map"),
    ],
)
def test_unusable_repository_is_refused(hub: Hub, tmp_path: Path, repo: dict[str, bytes], facts: str) -> None:
    hub.add("owner/odd", repo)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BaseModelError, match=facts):
        collect_into(locate("owner/odd", "main", tmp_path), out)
