"""Tokens that the base lacks: trained as rows of its embeddings, saved in the adapter, loaded with PEFT alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training.measuring import unbounded
from training.models import CONFIGS, SHAPE, VOCABULARY, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PhiConfig

from finetune_assets.store.base_models import PACKAGED
from finetune_assets.training.batches import collate
from finetune_assets.training.model import ModelError
from finetune_assets.training.recipe import LoraFinetune

Finetune = Callable[..., LoraFinetune]
CPU = torch.device("cpu")
TOKENS = ["### Instruction:", "### Response:"]
"""They stand in every prompt, where the base's tokenizer makes several tokens of each."""
ADDED = f"data.tokenization.added_tokens={json.dumps(TOKENS)}"
OTHERS = f"data.tokenization.added_tokens={json.dumps(TOKENS[::-1])}"
SETTINGS = ("training.max_steps=3", "training.learning_rate=1e-2", ADDED)
SPARE = LlamaConfig(**{**SHAPE, "vocab_size": VOCABULARY + 1}, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of base models, by name; `spare` has room for one of the two tokens, `roomy` for both."""
    configs = {**CONFIGS, "spare": SPARE, "roomy": LlamaConfig(**{**SHAPE, "vocab_size": VOCABULARY + 5})}
    made = {"packaged": PACKAGED["demo-base"]}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = save_model(configs[name], tmp_path_factory.mktemp(name))
        return made[name]

    return base


LAYERS = {
    "packaged": ("model.embed_tokens",),
    "llama": ("model.embed_tokens", "lm_head"),
    "spare": ("model.embed_tokens",),
    "roomy": ("model.embed_tokens", "lm_head"),
    "gemma": ("model.embed_tokens",),
    "gpt-neox": ("gpt_neox.embed_in", "lm_head"),
    "gpt2": ("transformer.wte",),
}


def row_names(output: Path) -> set[str]:
    return {name for name in load_file(output / "adapter_model.safetensors") if "lora_" not in name}


@pytest.mark.parametrize("name", LAYERS)
def test_peft_alone_loads_what_was_trained(
    name: str, bases: Callable[[str], Path], finetune: Finetune, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bases(name)
    run = finetune(*SETTINGS, base=folder)
    run.run()
    output = run.job.output
    said = capsys.readouterr().out
    assert f"2 new tokens, trained as rows of {' and '.join(LAYERS[name])}" in said
    rows = {f"base_model.model.{layer}.token_adapter.trainable_tokens_delta" for layer in LAYERS[name]}
    assert row_names(output) == rows
    saved = load_file(output / "adapter_model.safetensors")
    assert {tuple(saved[row].shape) for row in rows} == {(2, run.model.config.hidden_size)}

    tokenizer = AutoTokenizer.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    had = base.get_input_embeddings().weight.shape[0]
    assert ("resized to 1,026 rows" in said) == (had < len(tokenizer) == VOCABULARY + 2)
    if len(tokenizer) > had:
        base.resize_token_embeddings(len(tokenizer))
    loaded = PeftModel.from_pretrained(base, output).eval()
    batch = collate([[0]], run.train, CPU)
    assert {VOCABULARY, VOCABULARY + 1} <= {*batch.input_ids.flatten().tolist()}
    assert tokenizer.convert_ids_to_tokens([VOCABULARY, VOCABULARY + 1]) == TOKENS
    with torch.inference_mode():
        ours, theirs = unbounded(run).eval()(input_ids=batch.input_ids).logits, loaded(input_ids=batch.input_ids).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["packaged", "llama"])
def test_new_rows_and_no_others_are_trained(name: str, bases: Callable[[str], Path], finetune: Finetune) -> None:
    run = finetune(*SETTINGS, base=bases(name))
    embeddings = [run.model.get_input_embeddings(), run.model.get_output_embeddings()]
    before = [embedding.weight.clone() for embedding in embeddings]
    run.run()
    for embedding, old in zip(embeddings, before, strict=True):
        changed = (embedding.weight != old).any(1).nonzero().flatten().tolist()
        assert changed == [VOCABULARY, VOCABULARY + 1]
        assert (old[:VOCABULARY].mean(0) - old[VOCABULARY:]).abs().max() < 1e-6, "new rows begin as the mean"


@pytest.mark.parametrize("name", ["packaged", "llama"])
def test_the_model_cards_own_lines_load_it(name: str, bases: Callable[[str], Path], finetune: Finetune) -> None:
    run = finetune(*SETTINGS, base=bases(name))
    run.run()
    card = (run.job.output / "README.md").read_text()
    assert "resize_token_embeddings(1026)" in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('adapter = "."', "adapter = " + repr(str(run.job.output)))
    scope: dict[str, object] = {}
    exec(code.replace('"the folder of packaged/demo-base"', repr(str(bases(name)))), scope)
    assert len(scope["tokenizer"]) == VOCABULARY + 2  # type: ignore[arg-type]


def test_without_new_tokens_the_card_resizes_nothing(finetune: Finetune) -> None:
    run = finetune("training.max_steps=1")
    run.run()
    assert "resize_token_embeddings" not in (run.job.output / "README.md").read_text()
    assert not row_names(run.job.output)


@pytest.mark.parametrize("name", ["packaged", "llama"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_resumed_training_ends_bit_equal(
    name: str, quantization: str, bases: Callable[[str], Path], finetune: Finetune
) -> None:
    settings = (*SETTINGS, "training.max_steps=5", "training.save_steps=2", "lora.dropout=0.1")
    settings = (*settings, f"model.quantization={quantization}")
    undisturbed = finetune(*settings, base=bases(name), name="undisturbed")
    undisturbed.run()
    victim = finetune(*settings, base=bases(name), name="victim")
    train_step = victim.train_step
    victim.train_step = lambda step, work: train_step(step, work) if step < 3 else 1 / 0  # type: ignore
    with pytest.raises(ZeroDivisionError):
        victim.run()
    resumed = finetune(*settings, base=bases(name), name="victim")
    resumed.run()
    assert next(entry["step"] for entry in resumed.log.history) == 1
    one, other = (load_file(run.job.output / "adapter_model.safetensors") for run in (undisturbed, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_they_train_over_a_quantized_base(quantization: str, finetune: Finetune) -> None:
    run = finetune(*SETTINGS, "training.max_steps=6", f"model.quantization={quantization}")
    before = run.model.get_input_embeddings().weight[VOCABULARY:].clone()
    run.run()
    assert run.log.held_out_loss["after"] < 0.95 * run.log.held_out_loss["before"]  # type: ignore[operator]
    assert (run.model.get_input_embeddings().weight[VOCABULARY:] - before).abs().max() > 1e-3


def test_checkpointing_activations_changes_nothing(finetune: Finetune) -> None:
    outputs = []
    for checkpointing in ("true", "false"):
        run = finetune(*SETTINGS, f"training.gradient_checkpointing={checkpointing}", name=checkpointing)
        run.run()
        outputs.append(load_file(run.job.output / "adapter_model.safetensors"))
    assert all(torch.allclose(tensor, outputs[1][name], atol=1e-5) for name, tensor in outputs[0].items())


def test_warm_start_of_the_same_tokens(finetune: Finetune) -> None:
    first = finetune(*SETTINGS, "training.max_steps=8", name="first")
    first.run()
    second = finetune(*SETTINGS, "training.max_steps=1", name="second", warm_start=first.job.output)
    second.run()
    assert second.log.trainable_parameters == first.log.trainable_parameters
    assert second.log.held_out_loss["before"] == pytest.approx(first.log.held_out_loss["after"], rel=1e-5)


@pytest.mark.parametrize(("first", "second"), [(ADDED, OTHERS), (ADDED, None), (None, ADDED)])
def test_warm_start_of_other_tokens_is_told(first: str | None, second: str | None, finetune: Finetune) -> None:
    begun = finetune("training.max_steps=1", *filter(None, [first]), name="first")
    begun.run()
    with pytest.raises(ModelError, match=r"warm_start: that adapter trained the tokens \[.*added_tokens makes it \["):
        finetune("training.max_steps=1", *filter(None, [second]), name="second", warm_start=begun.job.output)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["lora.modules_to_save=[lm_head]"], r"single rows, lora\.modules_to_save all of lm_head; take one"),
        (["lora.target_modules=[q_proj,embed_tokens]"], r"lora\.target_modules all of embed_tokens; take one"),
    ],
)
def test_what_could_not_be_saved_is_refused(overrides: list[str], told: str, finetune: Finetune) -> None:
    with pytest.raises(ModelError, match=rf"added_tokens: .*Instruction.*{told}"):
        finetune(*SETTINGS, *overrides)


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_scheme_that_cannot_save_rows_is_refused_where_the_base_lacks_some(
    scheme: str, finetune: Finetune, tmp_path: Path
) -> None:
    short = save_model(LlamaConfig(**{**SHAPE, "vocab_size": VOCABULARY - 1}), tmp_path / "short")
    with pytest.raises(ModelError, match=rf"cannot be trained with lora\.init_lora_weights {scheme}.*to true"):
        finetune(f"lora.init_lora_weights={scheme}", base=short)


def test_output_layer_with_a_bias_is_refused(finetune: Finetune, tmp_path: Path) -> None:
    """PEFT would compute it without: the loss would be wrong, silently."""
    folder = save_model(PhiConfig(**SHAPE), tmp_path)
    with pytest.raises(ModelError, match="output layer has a bias"):
        finetune(*SETTINGS, base=folder)
