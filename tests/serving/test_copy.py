"""A servable copy computes the logits of the adapter, also as a server reads it: one rank and one scale."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiers import tiered
from torch import Tensor
from trainings import Train
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_assets.errors import UserError
from finetune_assets.serving.copy import NotServable, write_servable_copy

IDS = torch.arange(3, 63).reshape(2, 30)
LEARNS_FAST = "training.learning_rate=0.005"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Variant:
    """An adapter to convert.

    Attributes:
        settings: Settings of its training.
        edits: Keys of its `adapter_config.json` to change after the training.
        base: Its base model, by the name in `training/models.py`.
        rank: Rank of the copy.
        misread: Whether a server would compute other logits from the adapter itself.
    """

    settings: tuple[str, ...]
    edits: dict[str, Any] = field(default_factory=dict)
    base: str = "packaged"
    rank: int = 8
    misread: bool = False


RANKS = "lora.rank_pattern={q_proj: 4, layers.0.mlp.up_proj: 12}"
ALPHAS = {"alpha_pattern": {"v_proj": 40, r"layers\.1\.mlp\..*": 3}}
VARIANTS = {
    "plain": Variant(("lora.rank=6",)),
    "rslora": Variant(("lora.rank=6", "lora.use_rslora=true")),
    "rank_pattern": Variant(("lora.rank=6", RANKS), rank=16, misread=True),
    "alpha_pattern": Variant(("lora.rank=6",), ALPHAS, misread=True),
    "both patterns": Variant(("lora.rank=6", RANKS), ALPHAS, rank=16, misread=True),
    "pissa": Variant(("lora.rank=6", "lora.init_lora_weights=pissa"), rank=16),
    "olora": Variant(("lora.rank=4", "lora.init_lora_weights=olora"), rank=8),
    "several modules": Variant(
        ("lora.rank=6", "lora.target_modules=[q_proj, down_proj]", "lora.layers_to_transform=[1]", "lora.alpha=11")
    ),
    "gpt2": Variant(("lora.rank=6",), {"alpha_pattern": {"c_attn": 40}}, base="gpt2", misread=True),
}
EVERY_CHANGE = {"both patterns", "gpt2"}


@pytest.fixture
def adapter(trained: Train, base_model: Callable[[str], Path], tmp_path: Path) -> Callable[[Variant], Path]:
    """Trains a variant, once for all of its training settings, and edits a copy of its folder."""

    def make(variant: Variant) -> Path:
        run = trained(LEARNS_FAST, *variant.settings, base=base_model(variant.base))
        folder = tmp_path / "adapter"
        shutil.copytree(run.job.output, folder)
        config = folder / "adapter_config.json"
        config.chmod(0o644)
        config.write_text(json.dumps({**json.loads(config.read_text()), **variant.edits}))
        return folder

    return make


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def as_served(base_folder: Path, adapter: Path) -> Tensor:
    """Logits as a server computes them that reads one scale for all modules, as vLLM did before it read patterns."""
    model, tensors = base(base_folder), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        a, b = tensors[name].float(), tensors[name.replace("lora_A", "lora_B")].float()
        module = model.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
        module.register_forward_hook(lambda _, x, out, a=a, b=b: out + x[0] @ a.T @ (scale * b).T)
    return logits(model)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of logits, relative to their standard deviation."""
    return float((found - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize("name", tiered(VARIANTS, EVERY_CHANGE, ("rslora", "pissa", "several modules")))
def test_copy_computes_the_logits_of_the_adapter(
    name: str, adapter: Callable[[Variant], Path], base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    variant = VARIANTS[name]
    trained_adapter, base_folder, copy = adapter(variant), base_model(variant.base), tmp_path / "copy"
    copy.mkdir()
    write_servable_copy(trained_adapter, copy, "the base", max_rank=16)

    wanted = logits(PeftModel.from_pretrained(base(base_folder), trained_adapter))
    assert difference(logits(base(base_folder)), wanted) > 0.01, "the adapter does nothing"
    assert difference(logits(PeftModel.from_pretrained(base(base_folder), copy)), wanted) <= 1e-5
    assert difference(as_served(base_folder, copy), wanted) <= 1e-5
    misread = difference(as_served(base_folder, trained_adapter), wanted)
    assert misread > 1e-3 if variant.misread else misread <= 1e-5

    config = json.loads((copy / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the base"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (variant.rank, variant.rank, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    with safe_open(copy / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    assert {shape[0] for key, shape in shapes.items() if "lora_A" in key} == {variant.rank}
    assert {shape[1] for key, shape in shapes.items() if "lora_B" in key} == {variant.rank}


def test_copy_has_the_files_of_the_tokenizer_and_no_others(adapter: Callable[[Variant], Path], tmp_path: Path) -> None:
    folder, copy = adapter(VARIANTS["both patterns"]), tmp_path / "copy"
    copy.mkdir()
    write_servable_copy(folder, copy, "the base", max_rank=16)
    names = {path.name for path in copy.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in names - {"adapter_config.json", "adapter_model.safetensors"}:
        assert (copy / name).read_bytes() == (folder / name).read_bytes()


def written(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


Q = PREFIX + "model.layers.0.self_attn.q_proj"
MATRICES = {f"{Q}.lora_A.weight": torch.randn(4, 6), f"{Q}.lora_B.weight": torch.randn(6, 4)}


def test_16_bit_matrices_and_embeddings_are_scaled_in_float32(tmp_path: Path) -> None:
    matrices = {
        **{name: tensor.bfloat16() for name, tensor in MATRICES.items()},
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.randn(4, 10).bfloat16(),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.randn(6, 4).bfloat16(),
    }
    (copy := tmp_path / "copy").mkdir()
    write_servable_copy(written(tmp_path / "adapter", matrices, lora_alpha=12.4), copy, "base", max_rank=8)
    found = load_file(copy / "adapter_model.safetensors")
    for module in (f"{Q}.lora_{{}}.weight", f"{PREFIX}model.embed_tokens.lora_embedding_{{}}"):
        a, b = (matrices[module.format(side)].float() for side in "AB")
        padded_a, padded_b = (found[module.format(side)] for side in "AB")
        assert padded_a.dtype == padded_b.dtype == torch.float32
        assert padded_a.shape[0] == padded_b.shape[1] == 8
        assert torch.allclose(padded_b @ padded_a, b @ a * 12.4 / 4, atol=1e-5)
        assert not padded_a[4:].any()
        assert not padded_b[:, 4:].any()


@pytest.mark.parametrize(
    ("config", "more", "named"),
    [
        ({"use_dora": True}, {}, ["use_dora true"]),
        ({"bias": "all"}, {}, ["bias", "all"]),
        ({"modules_to_save": ["lm_head"]}, {}, ["modules_to_save", "lm_head"]),
        ({"trainable_token_indices": {"embed_tokens": [9]}}, {}, ["trainable_token_indices", "embed_tokens"]),
        ({"peft_type": "LOHA"}, {}, ["peft_type", "LOHA"]),
        ({"r": 17}, {}, ["r 17", "serving.max_rank 16"]),
        ({"rank_pattern": {"q_proj": 32}}, {}, ["rank_pattern.q_proj 32", "serving.max_rank 16"]),
        ({"r": "4"}, {}, ["r '4'"]),
        ({"r": 0}, {}, ["r 0"]),
        ({"r": 1}, {}, [Q.removeprefix(PREFIX), "[4, 4]"]),
        ({"lora_alpha": "high"}, {}, [Q.removeprefix(PREFIX), "'high'"]),
        ({}, {f"{Q}.lora_magnitude_vector": torch.ones(6)}, [f"{Q}.lora_magnitude_vector"]),
        ({}, {f"{Q}.base_layer.bias": torch.ones(6)}, [f"{Q}.base_layer.bias"]),
        ({}, {f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, 6)}, ["lm_head", "[4]"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_cannot_be_served_is_refused_with_file_key_and_value(
    config: dict[str, Any], more: dict[str, Tensor], named: list[str], tmp_path: Path
) -> None:
    folder = written(tmp_path / "adapter", {**MATRICES, **more}, **config)
    (tmp_path / "copy").mkdir()
    with pytest.raises(NotServable) as error:
        write_servable_copy(folder, tmp_path / "copy", "base", max_rank=16)
    for text in (str(folder), *named):
        assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["no config", "not JSON", "no weights", "damaged weights", "no tensors"])
def test_a_damaged_adapter_is_one_error(damage: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", {} if damage == "no tensors" else MATRICES)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "not JSON":
        folder.joinpath("adapter_config.json").write_text('{"r": ')
    elif damage == "no weights":
        weights.unlink()
    elif damage == "damaged weights":
        weights.write_bytes(weights.read_bytes()[:-5])
    (tmp_path / "copy").mkdir()
    with pytest.raises(UserError) as error:
        write_servable_copy(folder, tmp_path / "copy", "base", max_rank=16)
    assert (config if damage in ("no config", "not JSON") else weights).name in str(error.value)
