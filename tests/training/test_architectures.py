"""The same training on models of many architectures: what is adapted, what is learned, and what loads again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiers import tiered
from training.conftest import FinishedRun
from training.measuring import attention, gradients, logits, relative, token_losses, without_fused_lora
from training.models import CONFIGS
from transformers import AutoModelForCausalLM

from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.generation import answers
from finetune_assets.training.attention import VARLEN
from finetune_assets.training.batches import collate
from finetune_assets.training.recipe import LoraFinetune

Finetune = Callable[..., LoraFinetune]
CPU = torch.device("cpu")
FEW = ("training.macro_batch_size=2", "training.micro_batch_size=2")
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


PUSHED = ("llama", "gemma2", "gpt2")
"""Structures of `make test`: grouped heads, capped scores, Conv1D in place of Linear."""


@pytest.fixture(
    scope="module",
    params=tiered(CONFIGS, PUSHED),
)
def architecture(request: pytest.FixtureRequest, base_model: Callable[[str], Path]) -> tuple[str, Path]:
    """Name and folder of a model."""
    return request.param, base_model(request.param)


@pytest.fixture
def run(architecture: tuple[str, Path], trained: Callable[..., FinishedRun]) -> LoraFinetune:
    """A training that has ended, only to be read."""
    return trained(*SETTINGS, base=architecture[1]).run


def test_all_linear_is_every_linear_layer_but_the_output(
    architecture: tuple[str, Path], run: LoraFinetune, finetune: Finetune
) -> None:
    name, folder = architecture
    layers, modules = LINEAR[name]
    expected = {f"{layers}.{layer}.{module}" for layer in (0, 1) for module in modules.split()}
    assert {*run.model.targeted_module_names} == expected
    every = finetune("lora.layers_to_transform=[0,1]", base=folder, name="every").model
    assert {*every.targeted_module_names} == expected
    last = finetune("lora.layers_to_transform=[1]", base=folder, name="last").model
    assert {*last.targeted_module_names} == {module for module in expected if f"{layers}.1." in module}


def test_training_lowers_the_loss(run: LoraFinetune) -> None:
    losses = [entry["loss"] for entry in run.log.history]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]


def test_peft_alone_loads_the_adapter(architecture: tuple[str, Path], run: LoraFinetune) -> None:
    base = AutoModelForCausalLM.from_pretrained(architecture[1], dtype=torch.float32)
    ids = collate([[0]], run.train, CPU).input_ids
    with torch.inference_mode():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, run.job.output).eval()(input_ids=ids).logits
    assert torch.equal(after, logits(run, ids))
    assert (after - before).abs().max() > 0.05


def test_packed_equals_alone_token_by_token(architecture: tuple[str, Path], run: LoraFinetune) -> None:
    """And without the position ids, which tell examples apart, it would not."""
    assert run.flat == (architecture[0] != "gemma2"), "whose attention caps its scores"
    pack = max(run.sequences, key=len)
    assert len(pack) > 2
    batch = collate([pack], run.train, CPU)
    with attention(run, "eager"):
        alone = torch.cat([token_losses(run, collate([[example]], run.train, CPU)) for example in pack])
        assert (token_losses(run, batch) - alone).abs().max() < 1e-3
        assert (token_losses(run, replace(batch, position_ids=None)) - alone).abs().max() > 0.1
    if run.flat:
        assert run.model.config._attn_implementation == VARLEN
        assert (token_losses(run, collate([pack], run.train, CPU, flat=True)) - alone).abs().max() < 1e-3


def test_answers_are_the_same_alone_and_padded(architecture: tuple[str, Path]) -> None:
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
    architecture: tuple[str, Path], quantization: str, finetune: Finetune
) -> None:
    """With biases too, where bitsandbytes gives an output that must not be written to."""
    settings = (f"model.quantization={quantization}", "training.max_grad_norm=0", "lora.dropout=0", *FEW)
    fused, own = (finetune(*settings, base=architecture[1], name=name) for name in ("fused", "own"))
    assert without_fused_lora(own) == fused.log.active["fused_lora_layers"] > 0
    assert relative(gradients(fused), gradients(own)) < 1e-5
