"""A GGUF file of a merged model computes and tokenizes as the model does; what it cannot is refused."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT
from tiers import tiered
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from training.conftest import ALONE, BASE
from trainings import Train, Trained
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_assets.assets.merged_model import OF_GGUF, _merge_check
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import load_experiment
from finetune_assets.config.schema import Merge
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.contenders import Contender
from finetune_assets.evaluation.rows import held_out
from finetune_assets.merging import gguf
from finetune_assets.merging.exports import export_all
from finetune_assets.merging.gguf import check_exportable, export, load_exported
from finetune_assets.merging.gguf_tokenizer import ExportError, check_tokens
from finetune_assets.merging.merge import LogitDifference, merged, positions, reference
from finetune_assets.sources.gguf.header import read_header
from finetune_assets.sources.gguf.pre_tokenizers import PRE_TOKENIZERS

LEARNS_FAST = "training.learning_rate=0.02"
EOS = 2


def exports(run: Trained, out: Path, settings: Merge) -> dict[str, LogitDifference]:
    def contender() -> Contender:
        return Contender.of_folder("adapter", run.job.base_model, run.job.output)

    rows = held_out(run.job.dataset, "val", run.config.data)
    compared = positions(rows, settings.compared_rows)
    expected = reference(contender(), compared, ALONE.device)
    merged(contender(), settings, out)
    return export_all(out, contender(), settings, rows, compared, expected, ALONE.device)


def test_files_compute_as_the_adapter_did(trained: Train, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    differences = exports(trained(LEARNS_FAST), out, Merge(gguf=["f16", "bf16", "q8_0"]))
    for kind, difference in differences.items():
        assert 1e-5 < difference.share <= OF_GGUF[kind], kind
        assert difference.rows == 8
    assert differences["bf16"].share < differences["q8_0"].share
    assert sorted(path.name for path in (out / "gguf").iterdir()) == [
        "Modelfile",
        "model-bf16.gguf",
        "model-f16.gguf",
        "model-q8_0.gguf",
    ]
    sizes = {kind: (out / "gguf" / f"model-{kind}.gguf").stat().st_size for kind in OF_GGUF}
    assert 0.5 < sizes["q8_0"] / sizes["f16"] < 0.56, "34 bytes in place of 64"
    metadata = read_header(out / "gguf" / "model-q8_0.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.eos_token_id"] == EOS
    assert (out / "gguf" / "Modelfile").read_text().startswith("FROM ./model-f16.gguf\n")


@pytest.mark.system
def test_without_the_setting_there_is_no_file(trained: Train, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert exports(trained(LEARNS_FAST), out, Merge()) == {}
    assert not (out / "gguf").exists()
    exports(trained(LEARNS_FAST), out, Merge(gguf=["bf16"], modelfile=False))
    assert [path.name for path in (out / "gguf").iterdir()] == ["model-bf16.gguf"]


@pytest.mark.system
def test_wrong_weights_in_a_file_are_measured(trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "interleaved", lambda rows, heads: rows)  # llama.cpp would rotate other pairs
    differences = exports(trained(LEARNS_FAST), tmp_path / "merged", Merge(gguf=["bf16"]))
    assert differences["bf16"].share > OF_GGUF["bf16"]


LLAMA3 = LlamaConfig(
    vocab_size=1024,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.2,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)


@pytest.fixture
def model(base_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny random model, in which a file may be changed."""

    def make(name: str) -> Path:
        if name != "llama3":
            return Path(shutil.copytree(base_model(name), tmp_path / name))
        folder = tmp_path / name
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LLAMA3, dtype=torch.float32).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BASE / file, folder)
        return folder

    return make


@pytest.mark.parametrize("name", tiered(["llama", "llama-tied", "llama3", "qwen2", "qwen3", "mistral"], {"llama"}))
def test_architectures(model: Callable[[str], Path], name: str) -> None:
    folder = model(name)
    path = export(folder, "f16", load_tokenizer(str(folder)), [EOS], True)
    ids = torch.randint(3, 1000, (2, 100), generator=torch.Generator().manual_seed(0))
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected, actual = (each(ids).logits for each in (original, load_exported(path, ALONE.device)))
    assert (expected - actual).abs().mean() / expected.std(-1).mean() < 1e-3


@pytest.mark.parametrize("name", tiered(["gpt-neox", "phi3", "gemma2", "gpt2"], {"gpt-neox"}))
def test_other_architectures_are_refused_before_merging(model: Callable[[str], Path], name: str) -> None:
    folder = model(name)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    with pytest.raises(ExportError, match=rf"architecture {kind} .*llama, mistral, qwen2, qwen3.*merge\.gguf"):
        check_exportable(folder, load_tokenizer(str(BASE)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_type", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_settings_that_a_file_cannot_express(model: Callable[[str], Path], key: str, value: Any) -> None:
    folder = model("llama")
    config = json.loads((folder / "config.json").read_text())
    config |= value if isinstance(value, dict) else {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=rf"config\.json: .*{key} is "):
        check_exportable(folder, load_tokenizer(str(BASE)))


def test_a_sliding_window_becomes_the_context_length(model: Callable[[str], Path]) -> None:
    folder = model("mistral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 64}))
    path = export(folder, "f16", load_tokenizer(str(folder)), [EOS], True)
    assert read_header(path).metadata["llama.context_length"] == 64


def test_numbers_beyond_float16(model: Callable[[str], Path]) -> None:
    folder = model("llama")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        loaded.model.layers[1].mlp.up_proj.weight[3, 5] = 70_000.0
    loaded.save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*7e\+04.*bf16"):
        export(folder, "f16", tokenizer, [EOS], True)
    export(folder, "bf16", tokenizer, [EOS], True)


def changed_tokenizer(folder: Path, change: Callable[[Tokenizer], None]) -> Any:
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    change(tokenizer)
    tokenizer.save(str(path))
    return load_tokenizer(str(folder))


def _set(**parts: Any) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: [setattr(tokenizer, name, part) for name, part in parts.items()] and None


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)])
REFUSED_TOKENIZERS = {
    "groups of digits": (_set(pre_tokenizer=DIGITS), "individual_digits"),
    "a space before a text": (_set(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
    "another expression": (
        _set(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            )
        ),
        r"\\\\w\+",
    ),
    "lower case": (_set(normalizer=normalizers.Lowercase()), "Lowercase"),
}


@pytest.mark.parametrize("case", REFUSED_TOKENIZERS)
def test_tokenizers_that_llama_cpp_does_not_reproduce(model: Callable[[str], Path], case: str) -> None:
    change, named = REFUSED_TOKENIZERS[case]
    folder = model("llama")
    tokenizer = changed_tokenizer(folder, change)
    with pytest.raises(ExportError, match=rf"tokenizer\.json: .*{named}"):
        check_exportable(folder, tokenizer)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=lambda pre: pre.name)
def test_each_pre_tokenizer_comes_back(model: Callable[[str], Path], pre: Any) -> None:
    folder = model("llama")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["pre_tokenizer"] = pre.to_json()
    tree["model"]["ignore_merges"] = pre.ignores_merges
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(str(folder))
    path = export(folder, "f16", tokenizer, [EOS], True)
    assert read_header(path).metadata["tokenizer.ggml.pre"] == pre.name
    check_tokens(path, tokenizer, ["In 1984, 12345 people said it's over."])


def test_other_tokens_in_the_file_are_an_error(model: Callable[[str], Path]) -> None:
    folder = model("llama")
    tokenizer = load_tokenizer(str(folder))
    path = export(folder, "f16", tokenizer, [EOS], True)
    other = changed_tokenizer(folder, _set(normalizer=normalizers.Replace("Halo", "Belo")))
    with pytest.raises(ExportError, match=r"model-f16\.gguf: the tokens of held-out row 2 differ from token 2 on"):
        check_tokens(path, other, ["A town", "A Haloholm"])


def test_a_token_that_strips_spaces_is_refused(model: Callable[[str], Path]) -> None:
    from tokenizers import AddedToken

    folder = model("llama")
    tokenizer = changed_tokenizer(
        folder, lambda each: each.add_special_tokens([AddedToken("<pad>", lstrip=True)]) and None
    )
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(ExportError, match=r"'<(mask|pad)>' has lstrip"):
        check_exportable(folder, tokenizer)


def test_the_chat_template_and_all_ends_are_in_the_file(model: Callable[[str], Path]) -> None:
    folder = model("llama")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = "{{ messages[0].content }}"
    metadata = read_header(export(folder, "f16", tokenizer, [EOS, 17, 23], False)).metadata
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
    ids = {key: metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot", "eom", "padding")}
    assert ids == {"bos": 1, "eos": EOS, "eot": 17, "eom": 23, "padding": 0}
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    with pytest.raises(ExportError, match=r"4 tokens \(\[2, 17, 23, 29\]\)"):
        export(folder, "f16", tokenizer, [EOS, 17, 23, 29], False)


@pytest.mark.parametrize(
    ("setting", "key", "named"),
    [
        ("merge.gguf=[q4_0]", "merge.gguf", "'q4_0' is not a format; use f16, bf16, q8_0"),
        ("merge.gguf=[f16,f16]", "merge.gguf", "twice"),
        ("merge.gguf_max_difference=-1", "merge.gguf_max_difference", "-1"),
    ],
)
def test_impossible_settings(setting: str, key: str, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: .*{named}"):
        load_experiment(ROOT / "configs", "demo", ["merge={}", setting])


@pytest.mark.parametrize(("limit", "passed"), [(None, False), (0.1, True), (0.05, False)])
def test_a_file_that_is_too_far_off_fails_the_check(limit: float | None, passed: bool) -> None:
    close = {"share": 0.001, "mean": 0.01, "largest": 0.1, "rows": 8}
    comparison = {**close, "dtype": "bfloat16", "quantization": "none", "gguf": {"f16": close, "q8_0": {"share": 0.06}}}
    context: Any = SimpleNamespace(log=logging.getLogger())
    result = _merge_check(context, comparison, Merge(gguf=["f16", "q8_0"], gguf_max_difference=limit))
    assert result.passed is passed
    assert "model-q8_0.gguf: 6.000%" in (result.description or "")
