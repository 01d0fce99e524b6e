"""Tokens that the base lacks: trained as rows of its embeddings, saved in the adapter, loaded with PEFT alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from training.conftest import FinishedRun
from training.measuring import card_code, logits, names, weights
from training.models import VOCABULARY
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_assets.training.batches import collate
from finetune_assets.training.model import ModelError
from finetune_assets.training.recipe import LoraFinetune

Finetune = Callable[..., LoraFinetune]
Trained = Callable[..., FinishedRun]
BaseModel = Callable[[str], Path]
CPU = torch.device("cpu")
TOKENS = ["### Instruction:", "### Response:"]
"""They stand in every prompt, where the base's tokenizer makes several tokens of each."""
SETTING = "data.tokenization.added_tokens"
ADDED = f"{SETTING}={json.dumps(TOKENS)}"
OTHERS = f"{SETTING}={json.dumps(TOKENS[::-1])}"
SMALL = ("training.macro_batch_size=2", "training.micro_batch_size=2", "training.learning_rate=1e-2")
SETTINGS = (*SMALL, "training.max_steps=3", ADDED)
LAYERS = {
    "llama-tied": ("model.embed_tokens",),
    "llama": ("model.embed_tokens", "lm_head"),
    "one spare row": ("model.embed_tokens",),
    "spare rows": ("model.embed_tokens", "lm_head"),
    "gemma": ("model.embed_tokens",),
    "gpt-neox": ("gpt_neox.embed_in", "lm_head"),
    "gpt2": ("transformer.wte",),
}


def row_names(run: LoraFinetune) -> set[str]:
    return {name for name in weights(run) if "lora_" not in name}


@pytest.mark.parametrize("name", LAYERS)
def test_peft_alone_loads_what_was_trained(name: str, base_model: BaseModel, trained: Trained) -> None:
    folder = base_model(name)
    run = trained(*SETTINGS, base=folder).run
    assert (run.new_tokens.layers, [*run.new_tokens.texts.values()]) == (LAYERS[name], TOKENS)
    rows = {f"base_model.model.{layer}.token_adapter.trainable_tokens_delta" for layer in LAYERS[name]}
    assert row_names(run) == rows
    assert {tuple(weights(run)[row].shape) for row in rows} == {(2, run.model.config.hidden_size)}

    tokenizer = AutoTokenizer.from_pretrained(run.job.output)
    assert tokenizer.convert_ids_to_tokens([VOCABULARY, VOCABULARY + 1]) == TOKENS
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    had = base.get_input_embeddings().weight.shape[0]
    assert run.new_tokens.rows == (VOCABULARY + 2 if had < VOCABULARY + 2 else None)
    if len(tokenizer) > had:
        base.resize_token_embeddings(len(tokenizer))
    loaded = PeftModel.from_pretrained(base, run.job.output).eval()
    batch = collate([[0]], run.train, CPU)
    assert {VOCABULARY, VOCABULARY + 1} <= {*batch.input_ids.flatten().tolist()}
    with torch.inference_mode():
        theirs = loaded(input_ids=batch.input_ids).logits
    assert torch.equal(logits(run, batch.input_ids), theirs)


@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_new_rows_and_no_others_are_trained(name: str, base_model: BaseModel, finetune: Finetune) -> None:
    run = finetune(*SETTINGS, base=base_model(name))
    embeddings = [run.model.get_input_embeddings(), run.model.get_output_embeddings()]
    before = [embedding.weight.clone() for embedding in embeddings]
    run.run()
    for embedding, old in zip(embeddings, before, strict=True):
        changed = (embedding.weight != old).any(1).nonzero().flatten().tolist()
        assert changed == [VOCABULARY, VOCABULARY + 1]
        assert (old[:VOCABULARY].mean(0) - old[VOCABULARY:]).abs().max() < 1e-6, "new rows begin as the mean"


@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_the_model_cards_own_lines_load_it(name: str, base_model: BaseModel, trained: Trained) -> None:
    output = trained(*SETTINGS, base=base_model(name)).run.job.output
    code = card_code(output, base_model(name))
    assert f"resize_token_embeddings({VOCABULARY + 2})" in code
    scope: dict[str, object] = {}
    exec(code, scope)
    assert len(scope["tokenizer"]) == VOCABULARY + 2  # type: ignore[arg-type]


def test_without_new_tokens_the_card_resizes_nothing(base_model: BaseModel, trained: Trained) -> None:
    run = trained(*SMALL, "training.max_steps=1", base=base_model("llama")).run
    assert "resize_token_embeddings" not in (run.job.output / "README.md").read_text()
    assert not row_names(run)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_they_train_over_a_quantized_base(quantization: str, base_model: BaseModel, finetune: Finetune) -> None:
    settings = ("training.max_steps=6", f"model.quantization={quantization}")
    run = finetune(*SETTINGS, *settings, base=base_model("llama-tied"))
    before = run.model.get_input_embeddings().weight[VOCABULARY:].clone()
    run.run()
    assert run.log.held_out_loss["after"] < 0.95 * run.log.held_out_loss["before"]  # type: ignore[operator]
    assert (run.model.get_input_embeddings().weight[VOCABULARY:] - before).abs().max() > 1e-3


def test_warm_start_of_the_same_tokens(base_model: BaseModel, trained: Trained, finetune: Finetune) -> None:
    base = base_model("llama-tied")
    first = trained(*SETTINGS, base=base).run
    assert first.log.held_out_loss["after"] != pytest.approx(first.log.held_out_loss["before"], rel=1e-3)
    second = finetune(*SETTINGS, "training.max_steps=1", base=base, warm_start=first.job.output)
    second.run()
    assert second.log.trainable_parameters == first.log.trainable_parameters
    assert second.log.held_out_loss["before"] == pytest.approx(first.log.held_out_loss["after"], rel=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "facts"),
    [(ADDED, OTHERS, [str(TOKENS), str(TOKENS[::-1])]), (ADDED, None, [str(TOKENS)]), (None, ADDED, [str(TOKENS)])],
)
def test_warm_start_of_other_tokens_is_refused(
    first: str | None,
    second: str | None,
    facts: list[str],
    base_model: BaseModel,
    trained: Trained,
    finetune: Finetune,
) -> None:
    base = base_model("llama")
    settings = (*SMALL, "training.max_steps=1")
    begun = trained(*settings, *filter(None, [first]), base=base).run
    with pytest.raises(ModelError) as error:
        finetune(*settings, *filter(None, [second]), base=base, warm_start=begun.job.output)
    assert names(error, "training.warm_start", SETTING, *facts)


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("lora.modules_to_save=[lm_head]", ("lora.modules_to_save", "lm_head")),
        ("lora.target_modules=[q_proj,embed_tokens]", ("lora.target_modules", "embed_tokens")),
    ],
)
def test_what_could_not_be_saved_is_refused(override: str, facts: tuple[str, str], finetune: Finetune) -> None:
    with pytest.raises(ModelError) as error:
        finetune(*SETTINGS, override)
    assert names(error, SETTING, str(TOKENS), *facts)


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_scheme_that_cannot_save_rows_is_refused_where_the_base_lacks_some(
    scheme: str, base_model: BaseModel, finetune: Finetune
) -> None:
    with pytest.raises(ModelError) as error:
        finetune(f"lora.init_lora_weights={scheme}", base=base_model("one row too few"))
    assert names(error, "model.base_model", "lora.init_lora_weights", scheme)


def test_output_layer_with_a_bias_is_refused(finetune: Finetune, base_model: BaseModel) -> None:
    """PEFT would compute it without: the loss would be wrong, silently."""
    with pytest.raises(ModelError) as error:
        finetune(*SETTINGS, base=base_model("phi"))
    assert names(error, SETTING, "bias")
