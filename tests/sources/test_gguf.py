"""A base model from a GGUF file: converted exactly, or refused with one error that names what is wrong."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from limited import run_limited
from safetensors.torch import load_file
from tiers import tiered
from transformers import AutoModelForCausalLM

from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.merging.gguf import export
from finetune_assets.sources.base_models import PACKAGED, BaseModelError, collect, locate
from finetune_assets.sources.gguf import convert as converting
from finetune_assets.sources.gguf.convert import convert
from finetune_assets.sources.gguf.header import GgufError, read_header

BASE = PACKAGED["demo-base"]
TEXT = "In 1984, it's 12345  people\n\n in Haloholm."


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model as a GGUF file, in bfloat16."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    shutil.copytree(BASE, folder)
    return export(folder, "bf16", load_tokenizer(str(folder)), [2], True)


def converted(path: Path, out: Path) -> Path:
    source = locate(str(path), "main", path.parent)
    out.mkdir()
    files, _ = collect(source, workspace=out)
    assert {*files.values()} == {*out.iterdir()}
    return out


def test_what_was_exported_comes_back(exported: Path, tmp_path: Path) -> None:
    out = converted(exported, tmp_path / "out")
    weights, original = load_file(out / "model.safetensors"), load_file(BASE / "model.safetensors")
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in original)
    before, after = load_tokenizer(str(BASE)), load_tokenizer(str(out))
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert after.decode(after(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    assert after.get_vocab() == before.get_vocab()
    for name in ("bos_token", "eos_token", "pad_token", "model_max_length"):
        assert getattr(after, name) == getattr(before, name)
    config, known = (json.loads((folder / "config.json").read_text()) for folder in (out, BASE))
    assert {key: known[key] for key in config if key in known} == {key: config[key] for key in config if key in known}
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_a_large_model_has_shards(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "SHARD_BYTES", 1 << 20)
    out = converted(exported, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) == 5
    assert index["metadata"]["total_size"] == sum(
        each.nbytes for each in load_file(BASE / "model.safetensors").values()
    )
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (BASE, out)]
    assert torch.equal(*logits)


def test_the_identity_is_the_content(exported: Path, tmp_path: Path) -> None:
    source = locate(str(exported), "main", tmp_path)
    (tmp_path / "mine.gguf").write_bytes(exported.read_bytes())
    same = locate("./mine.gguf", "main", tmp_path)
    assert (source.repo, same.repo) == ("local/model-bf16.gguf", "local/mine.gguf")
    assert source.revision == same.revision
    (tmp_path / "mine.gguf").write_bytes(exported.read_bytes()[:-1] + b"\1")
    assert locate("./mine.gguf", "main", tmp_path).revision != same.revision


@pytest.mark.parametrize(("setting", "named"), [("./gone.gguf", "gone.gguf does not exist"), ("./folder", "mine.gguf")])
def test_names_of_nothing(tmp_path: Path, setting: str, named: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.gguf").touch()
    with pytest.raises(BaseModelError, match=named):
        locate(setting, "main", tmp_path)


# ---- files that are damaged, hostile, or of another kind

STRING, ARRAY, U32 = 8, 9, 4
MOST = (1 << 64) - 1


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(pairs: bytes = b"", tensors: bytes = b"", data: bytes = b"", /, **counts: int) -> bytes:
    version, tensor_count, pair_count = (counts.get(name, 0) for name in ("version", "tensors", "pairs"))
    head = b"GGUF" + struct.pack("<IQQ", version or 3, tensor_count, pair_count) + pairs + tensors
    return head + b"\0" * (-len(head) % 32) + data


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "another format": (b"PK\3\4" + b"\0" * 100, "not a GGUF file"),
    "version 1": (file(version=1), "version 1"),
    "big-endian": (file(version=3 << 24), "version 50331648"),
    "no metadata": (file(pairs=5), "truncated|not UTF-8|type"),
    "keys": (file(pairs=MOST), "number of metadata keys is 18,446,744,073,709,551,615"),
    "tensors": (file(tensors=1 << 40), "number of tensors is 1,099,511,627,776"),
    "a long key": (file(struct.pack("<Q", 1 << 62), pairs=1), "key is 4,611,686,018,427,387,904 bytes"),
    "a long text": (file(pair("k", STRING, struct.pack("<Q", 1 << 40)), pairs=1), "k is 1,099,511,627,776 bytes"),
    "a truncated text": (file(pair("k", STRING, struct.pack("<Q", 1 << 20)), pairs=1), "truncated: k of 1,048,576"),
    "elements": (file(pair("k", ARRAY, struct.pack("<IQ", U32, MOST)), pairs=1), "elements of k is 18,446,744"),
    "empty texts": (file(pair("k", ARRAY, struct.pack("<IQ", STRING, 1 << 40)), pairs=1), "elements of k is 1,099,511"),
    "nested arrays": (file(pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50), pairs=1), "k is an array of arrays"),
    "an unknown type": (file(pair("k", 13, b"1234"), pairs=1), "k has the unknown type 13"),
    "no text": (file(pair("k", STRING, text(b"\xff\xfe")), pairs=1), "k is not UTF-8"),
    "a key twice": (file(pair("k", U32, b"1234") * 2, pairs=2), "key k occurs twice"),
    "an alignment of 0": (file(pair("general.alignment", U32, b"\0" * 4), pairs=1), "general.alignment is 0"),
    "dimensions": (
        file(b"", text("t") + struct.pack("<I", 1 << 31), tensors=1),
        "dimensions of tensor t is 2,147,483,648",
    ),
    "a huge tensor": (file(b"", tensor(shape=(1 << 62, 1 << 62)), tensors=1), "truncated: tensor t"),
    "an empty tensor": (file(b"", tensor(shape=(0,)), tensors=1), r"tensor t has the shape \[0\]"),
    "a type of tensors": (file(b"", tensor(kind=999), tensors=1), "tensor t has the unknown type 999"),
    "an offset": (file(b"", tensor(offset=MOST), tensors=1), "truncated: tensor t ends at byte"),
    "a truncated tensor": (file(b"", tensor(), b"\0" * 15, tensors=1), "truncated: tensor t"),
    "one place for all": (file(b"", tensor("a") + tensor("b"), b"\0" * 32, tensors=2), "data of tensor b .*overlap"),
    "half a block": (file(b"", tensor(shape=(16,), kind=8), b"\0" * 64, tensors=1), r"shape \[16\].*type 8"),
    "a tensor twice": (file(b"", tensor() + tensor(offset=32), b"\0" * 64, tensors=2), "name occurs twice"),
    "no architecture": (file(), "no metadata key general.architecture"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    content, named = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=named) as caught:
        convert(path, tmp_path)
    assert str(path) in str(caught.value)
    run_limited(lambda: convert(path, tmp_path)).check(("GgufError",))


def test_a_file_cut_anywhere(exported: Path, tmp_path: Path) -> None:
    content, path = exported.read_bytes(), tmp_path / "model.gguf"
    for length in [*range(0, 200, 7), *range(200, len(content), len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(GgufError, match=r"truncated|not a GGUF file"):
            convert(path, tmp_path)


Change = Callable[[dict[str, Any], dict[str, Any]], object]


def rewritten(source: Path, path: Path, change: Change) -> Path:
    """A copy of a GGUF file with changed metadata and tensors; a tensor of None is left out."""
    header, reader = read_header(source), GGUFReader(source)
    metadata = dict(header.metadata)
    tensors: dict[str, Any] = {each.name: (np.array(each.data), each.tensor_type) for each in reader.tensors}
    change(metadata, tensors)
    writer = GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        kind = next(
            name
            for name, types in {"bool": bool, "string": str, "array": list, "uint32": int, "float32": float}.items()
            if isinstance(value, types)
        )
        getattr(writer, f"add_{kind}")(key, value)
    for name, entry in tensors.items():
        if entry is not None:
            writer.add_tensor(name, entry[0], raw_dtype=entry[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(**values: Any) -> Change:
    """Sets metadata; the names have `__` for a dot. A value of None is removed."""

    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name, value in values.items():
            key = name.replace("__", ".")
            metadata.pop(key, None) if value is None else metadata.update({key: value})

    return change


def _tensor(name: str, value: Any) -> Change:
    return lambda metadata, tensors: tensors.update({name: value})


F32 = GGMLQuantizationType.F32
REFUSED: dict[str, tuple[Change, str]] = {
    "architecture": (_metadata(general__architecture="mamba"), "general.architecture is 'mamba'; supported: llama"),
    "a million layers": (_metadata(llama__block_count=1 << 31), "llama.block_count is 2,147,483,648, but there are 38"),
    "fewer layers": (_metadata(llama__block_count=3), "tensor 'blk.3.attn_k.weight' is not one of the architecture"),
    "more layers": (_metadata(llama__block_count=5), r"tensor blk\.4\.attn_k\.weight is missing"),
    "no layers": (_metadata(llama__block_count=0), "llama.block_count is 0"),
    "width": (_metadata(llama__embedding_length=1 << 31), r"token_embd\.weight has the shape \[1024, 192\]"),
    "heads": (_metadata(llama__attention__head_count=0), "llama.attention.head_count is 0"),
    "more heads": (_metadata(llama__attention__head_count=7), r"attn_q\.weight has the shape|head"),
    "a text as a number": (_metadata(llama__context_length="8k"), "llama.context_length is '8k'"),
    "no size": (_metadata(llama__feed_forward_length=None), "no metadata key llama.feed_forward_length"),
    "experts": (_metadata(llama__expert_count=8), "llama.expert_count is 8"),
    "scaled positions": (_metadata(llama__rope__scaling__type="yarn"), "llama.rope.scaling.type is 'yarn'"),
    "a scale of logits": (_metadata(llama__logit_scale=0.5), "llama.logit_scale is 0.5"),
    "half of each head": (_metadata(llama__rope__dimension_count=16), "llama.rope.dimension_count is 16"),
    "sentencepiece": (_metadata(tokenizer__ggml__model="llama"), "tokenizer.ggml.model is 'llama'"),
    "pre-tokenizer": (_metadata(tokenizer__ggml__pre="tekken"), "tokenizer.ggml.pre is 'tekken'.*gpt-2"),
    "no pre-tokenizer": (_metadata(tokenizer__ggml__pre=None), "no metadata key tokenizer.ggml.pre"),
    "merges": (_metadata(tokenizer__ggml__merges=["zzz qqq"]), "tokenizer.ggml.merges has 'zzz qqq'"),
    "types of tokens": (_metadata(tokenizer__ggml__token_type=[1, 1]), "token_type has 2 elements for 1,024 tokens"),
    "EOS": (_metadata(tokenizer__ggml__eos_token_id=5_000), "eos_token_id is 5,000, but there are 1,024"),
    "more tokens": (_metadata(tokenizer__ggml__tokens=["a"] * 2_000), "2,000 tokens for 1,024 embeddings"),
    "equal tokens": (_metadata(tokenizer__ggml__tokens=["a"] * 1_024), "the token 'a' twice"),
    "numbers as tokens": (_metadata(tokenizer__ggml__tokens=[1] * 1_024), "tokenizer.ggml.tokens is"),
    "no norm": (_tensor("output_norm.weight", None), r"tensor output_norm\.weight is missing"),
    "another tensor": (_tensor("extra", (np.zeros(4, np.float32), F32)), "tensor 'extra' is not one"),
    "not a number": (
        _tensor("output_norm.weight", (np.full(192, np.nan, np.float32), F32)),
        r"output_norm\.weight has values that are not finite",
    ),
    "integers": (
        _tensor("output_norm.weight", (np.zeros(192, np.int32), GGMLQuantizationType.I32)),
        r"output_norm\.weight has the type I32",
    ),
    "positions": (
        _tensor("rope_freqs.weight", (np.linspace(1, 9, 16, dtype=np.float32), F32)),
        r"rope_freqs\.weight is \[1\.0",
    ),
}


@pytest.mark.parametrize(
    "name", tiered(REFUSED, {"architecture", "fewer layers", "a scale of logits", "pre-tokenizer"})
)
def test_files_that_are_not_converted(exported: Path, tmp_path: Path, name: str) -> None:
    change, named = REFUSED[name]
    path = rewritten(exported, tmp_path / "model.gguf", change)
    with pytest.raises(GgufError, match=named):
        convert(path, tmp_path)


@pytest.mark.parametrize("kind", tiered(["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "F32"], {"Q4_1"}))
def test_quantized_weights(exported: Path, tmp_path: Path, kind: str) -> None:
    original = load_file(BASE / "model.safetensors")["model.layers.2.mlp.up_proj.weight"].float()
    packed = quantize(original.numpy(), GGMLQuantizationType[kind])
    change = _tensor("blk.2.ffn_up.weight", (packed, GGMLQuantizationType[kind]))
    out = converted(rewritten(exported, tmp_path / "model.gguf", change), tmp_path / "out")
    weight = load_file(out / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]
    bits = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}.get(kind, 11)
    error = (weight.float() - original).abs().max() / original.abs().max()
    assert error <= 1.2 / 2 ** (bits - 1)
    assert (error > 1e-6) == (bits < 11)


def test_the_chat_template_comes_along(exported: Path, tmp_path: Path) -> None:
    change = _metadata(tokenizer__chat_template="{{ messages[0].content }}", tokenizer__ggml__eot_token_id=7)
    out = converted(rewritten(exported, tmp_path / "model.gguf", change), tmp_path / "out")
    assert load_tokenizer(str(out)).chat_template == "{{ messages[0].content }}"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
