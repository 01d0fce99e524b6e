"""The same training on models of many architectures: what is adapted, what is learned, and what loads again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from training.measuring import gradients, relative, token_losses, unbounded
from training.models import CONFIGS, save_model
from transformers import AutoModelForCausalLM

from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.generation import answers
from finetune_assets.training import setup
from finetune_assets.training.attention import VARLEN
from finetune_assets.training.batches import collate
from finetune_assets.training.recipe import LoraFinetune

Finetune = Callable[..., LoraFinetune]
CPU = torch.device("cpu")
SETTINGS = ("training.max_steps=6", "training.learning_rate=1e-2", "training.logging_steps=1")
LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
LINEAR = {
    "llama": ("model.layers", LLAMA),
    "llama-tied": ("model.layers", LLAMA),
    "qwen2": ("model.layers", LLAMA),
    "qwen3": ("model.layers", LLAMA),
    "mistral": ("model.layers", LLAMA),
    "gemma": ("model.layers", LLAMA),
    "gemma2": ("model.layers", LLAMA),
    "gemma3": ("model.layers", LLAMA),
    "phi": ("model.layers", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense mlp.fc1 mlp.fc2"),
    "phi3": ("model.layers", "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    "gpt-neox": (
        "gpt_neox.layers",
        "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    ),
    "gpt2": ("transformer.h", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
}
"""Of each architecture: the list of its layers, and the linear modules in each of the two."""


@pytest.fixture(scope="session", params=CONFIGS)
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name and folder of a model."""
    return request.param, save_model(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


def test_all_linear_is_every_linear_layer_but_the_output(architecture: tuple[str, Path], finetune: Finetune) -> None:
    name, folder = architecture
    layers, modules = LINEAR[name]
    expected = {f"{layers}.{layer}.{module}" for layer in (0, 1) for module in modules.split()}
    assert {*finetune(base=folder).model.targeted_module_names} == expected
    every = finetune("lora.layers_to_transform=[0,1]", base=folder, name="every").model
    assert {*every.targeted_module_names} == expected
    last = finetune("lora.layers_to_transform=[1]", base=folder, name="last").model
    assert {*last.targeted_module_names} == {module for module in expected if f"{layers}.1." in module}


def test_training_lowers_the_loss_and_peft_loads_the_adapter(
    architecture: tuple[str, Path], finetune: Finetune
) -> None:
    _, folder = architecture
    run = finetune(*SETTINGS, base=folder)
    run.run()
    losses = [entry["loss"] for entry in run.log.history]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = collate([[0]], run.train, CPU).input_ids
    with torch.inference_mode():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, run.job.output).eval()(input_ids=ids).logits
        ours = unbounded(run).eval()(input_ids=ids).logits
    assert torch.equal(after, ours)
    assert (after - before).abs().max() > 0.05


def test_packed_equals_alone_token_by_token(architecture: tuple[str, Path], finetune: Finetune) -> None:
    """And without the position ids, which tell examples apart, it would not."""
    name, folder = architecture
    run = finetune(base=folder)
    assert run.flat == (name != "gemma2"), "whose attention caps its scores"
    pack = max(run.sequences, key=len)
    assert len(pack) > 2
    run.model.get_base_model().set_attn_implementation("eager")
    alone = torch.cat([token_losses(run, collate([[example]], run.train, CPU)) for example in pack])
    batch = collate([pack], run.train, CPU)
    assert (token_losses(run, batch) - alone).abs().max() < 1e-3
    assert (token_losses(run, replace(batch, position_ids=None)) - alone).abs().max() > 0.1
    if run.flat:
        run.model.get_base_model().set_attn_implementation(VARLEN)
        assert (token_losses(run, collate([pack], run.train, CPU, flat=True)) - alone).abs().max() < 1e-3


def test_answers_are_the_same_alone_and_padded(architecture: tuple[str, Path], tmp_path: Path) -> None:
    """Also with a tokenizer that has no token to pad with."""
    _, folder = architecture
    tokenizer = load_tokenizer(str(folder))
    tokenizer.pad_token = None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ("Oslo", "The mill in Kelm was built by the miller's brother, who", "### Instruction: Who?\n### Response:")
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    alone = [answers(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert answers(model, tokenizer, prompts, max_new_tokens=12) == alone
    assert len({*alone}) > 1


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_gradient_is_that_of_pefts_own_layers(
    architecture: tuple[str, Path], quantization: str, finetune: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With biases too, where bitsandbytes gives an output that must not be written to."""
    _, folder = architecture
    settings = (f"model.quantization={quantization}", "training.max_grad_norm=0", "lora.dropout=0")
    found = gradients(finetune(*settings, base=folder, name="fused"))
    monkeypatch.setattr(setup, "speed_up", lambda model: 0)
    assert relative(found, gradients(finetune(*settings, base=folder, name="own"))) < 1e-5
