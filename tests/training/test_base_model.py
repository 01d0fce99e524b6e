"""Folders of base models: whole and sharded, tied and not, with their own code, damaged, and not fitting together."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.measuring import names
from training.models import CONFIGS, save_model
from transformers import AutoTokenizer, PreTrainedModel

from finetune_assets.config.schema import Model, Training
from finetune_assets.evaluation.generation import answers
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.training.model import ModelError, load_base

CPU = torch.device("cpu")
UP = "model.layers.0.mlp.up_proj.weight"
IDS = torch.arange(40)[None]


def load(folder: Path, own_code: bool = False, **model: Any) -> PreTrainedModel:
    return load_base(folder, Model(str(folder), **model), Training(), CPU, own_code).eval()


@torch.inference_mode()
def logits(folder: Path, own_code: bool = False, **model: Any) -> torch.Tensor:
    return load(folder, own_code, **model)(input_ids=IDS).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the packaged model."""
    return Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "base"))


def configure(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_shards_are_the_same_model_as_one_file(name: str, tmp_path: Path) -> None:
    whole = save_model(CONFIGS[name], tmp_path / "whole")
    shards = save_model(CONFIGS[name], tmp_path / "shards", max_shard_size="40KB")
    assert len([*shards.glob("model-*.safetensors")]) > 2
    assert (shards / "model.safetensors.index.json").exists()
    assert torch.equal(logits(shards), logits(whole))


def test_tied_embeddings_are_not_missing(tmp_path: Path) -> None:
    folder = save_model(CONFIGS["llama-tied"], tmp_path)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    base = load(folder)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


def test_tied_embeddings_stored_as_output_alone_load(tmp_path: Path) -> None:
    folder = save_model(CONFIGS["llama-tied"], tmp_path)
    expected = logits(folder)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_missing_weight_is_refused(quantization: str, folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(UP))
    with pytest.raises(ModelError) as error:
        load(folder, quantization=quantization)
    assert names(error, "model.base_model", folder, UP)


def test_missing_weights_are_counted(folder: Path) -> None:
    configure(folder, num_hidden_layers=5)
    with pytest.raises(ModelError, match=r"model\.layers\.4\.\S+ .*\b8\b"):
        load(folder)


def test_output_layer_that_is_missing_and_not_tied_is_refused(folder: Path) -> None:
    configure(folder, tie_word_embeddings=False)
    with pytest.raises(ModelError) as error:
        load(folder)
    assert names(error, "lm_head.weight")


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_mismatched_shapes_are_refused(quantization: str, folder: Path) -> None:
    """transformers says nothing about those that it quantizes."""
    configure(folder, intermediate_size=500)
    with pytest.raises(ModelError) as error:
        load(folder, quantization=quantization)
    assert names(error, "model.layers.0.mlp.down_proj.weight", [192, 512], [192, 500])
    assert re.search(r"\[192, 500\].*\b11\b", str(error.value)), "the number of the others"


def test_embeddings_of_another_vocabulary_are_refused(folder: Path) -> None:
    configure(folder, vocab_size=1_030)
    with pytest.raises(ModelError) as error:
        load(folder)
    assert names(error, "model.embed_tokens.weight", [1024, 192], [1030, 192])


def break_shard(folder: Path) -> None:
    save_model(CONFIGS["llama"], folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()


def lose_shard(folder: Path) -> None:
    break_shard(folder)
    next(folder.glob("model-00002-*")).unlink()


def lose_weight_map(folder: Path) -> None:
    break_shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5_000])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is lost": (lose_shard, "model-00002-"),
    "the index maps nothing": (lose_weight_map, "KeyError"),
    "weights are cut": (cut_weights, "SafetensorError"),
    "weights are gone": (lambda folder: (folder / "model.safetensors").unlink(), "OSError"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "config is no table": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "config of a wrong type": (lambda folder: configure(folder, hidden_size="abc"), "hidden_size"),
    "heads that do not divide": (lambda folder: configure(folder, num_attention_heads=7), "attention heads"),
    "quantized in a way unknown": (lambda folder: configure(folder, quantization_config={"bits": 4}), "quant"),
    "newer than transformers": (lambda folder: configure(folder, model_type="fancy9"), "fancy9"),
    "no language model": (lambda folder: configure(folder, model_type="clip"), "CLIPConfig"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_in_one_line(damage: str, folder: Path) -> None:
    spoil, fact = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ModelError) as error:
        load(folder)
    assert names(error, "model.base_model", folder)
    assert fact in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_weights_quantized_in_a_way_unknown_are_refused(folder: Path) -> None:
    """transformers would take the quantized numbers for weights."""
    configure(folder, quantization_config={"quant_method": "zzz"})
    with pytest.raises(ModelError) as error:
        load(folder)
    assert names(error, "model.base_model", "zzz")


def test_weights_that_are_quantized_already_stay_as_they_are(folder: Path) -> None:
    """bitsandbytes' own format loads as it was saved; another kind is refused."""
    expected = logits(folder, quantization="int8")
    stored = folder.parent / "stored"
    load(folder, quantization="int8").save_pretrained(stored)
    assert torch.equal(logits(stored), expected)
    with pytest.raises(ModelError) as error:
        load(stored, quantization="nf4")
    assert names(error, "model.quantization", "nf4", "none")


CODE = """
import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BigramConfig(PreTrainedConfig):
    model_type = "bigram"
    hidden_size: int = 8
    vocab_size: int = 1024


class Bigram(PreTrainedModel, GenerationMixin):
    config_class = BigramConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.mix(self.embed(input_ids))))
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose Python code lies in its folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "bigram"
    folder.mkdir()
    classes = {"AutoConfig": "bigram.BigramConfig", "AutoModelForCausalLM": "bigram.Bigram"}
    (folder / "config.json").write_text(json.dumps({"model_type": "bigram", "auto_map": classes}))
    (folder / "bigram.py").write_text(CODE)
    shapes = {"embed.weight": (1024, 8), "mix.weight": (8, 8), "mix.bias": (8,), "lm_head.weight": (1024, 8)}
    torch.manual_seed(0)
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def test_own_code_is_refused_without_asking(own_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    (own_code / "bigram.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError) as error:
        load(own_code)
    assert names(error, "model.trust_remote_code", "owner/name@commit")


def test_own_code_runs_where_it_is_trusted(own_code: Path) -> None:
    tensors = load_file(own_code / "model.safetensors")
    mixed = torch.nn.functional.linear(tensors["embed.weight"][IDS], tensors["mix.weight"], tensors["mix.bias"])
    assert torch.allclose(logits(own_code, own_code=True), mixed @ tensors["lm_head.weight"].T, atol=1e-5)


def test_own_code_that_fails_is_reported(own_code: Path) -> None:
    (own_code / "bigram.py").write_text("raise LookupError('out of luck')")
    with pytest.raises(ModelError) as error:
        load(own_code, own_code=True)
    assert names(error, "model.base_model", own_code, "LookupError: out of luck")


def test_answers_need_no_token_to_pad_with(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    configure(folder, pad_token_id=None)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    assert tokenizer.pad_token is None
    texts = ("Orrin is the", "The mill in Kelm was built by the miller's brother, and so", "### Instruction: Who?")
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    alone = [answers(model, tokenizer, [prompt], max_new_tokens=16)[0] for prompt in prompts]
    assert answers(model, tokenizer, prompts, max_new_tokens=16) == alone
    assert all(alone)
