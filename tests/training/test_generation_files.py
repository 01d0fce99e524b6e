"""Tokenizer and generation settings of an adapter: generation ends where answers ended in training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data.chats import CHATML, FAMILIES
from data.tool_chats import TOOL_FAMILIES
from paths import ROOT
from tokenizers import processors
from transformers import AutoTokenizer, GenerationConfig

from finetune_assets.config.loading import load_resolved
from finetune_assets.config.schema import Data, ExperimentConfig, Model, PromptTemplate, Tokenization
from finetune_assets.data.questions import questions
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.training.embeddings import experiment_tokenizer
from finetune_assets.training.generation_files import adapter_tokenizer, experiment_turn_end, save_generation_files
from finetune_assets.training.output import PROMPT_LINES

EOS = 2
SYSTEM_ONLY = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML


def saved(
    tmp_path: Path,
    template: str | None,
    *added: str,
    settings: dict[str, Any] | None = None,
    base: Path = PACKAGED["demo-base"],
) -> tuple[Any, GenerationConfig]:
    """Tokenizer and generation settings of an adapter over a base with this chat template and these settings."""
    base = Path(shutil.copytree(base, tmp_path / "base"))
    if template:
        (base / "chat_template.jinja").write_text(template)
    if settings is not None:
        (base / "generation_config.json").write_text(json.dumps(settings))
    config = ExperimentConfig(
        model=Model(base_model="x"),
        data=Data(
            prompt_template=PromptTemplate(chat_template=template is not None),
            tokenization=Tokenization(added_tokens=list(added)),
        ),
    )
    save_generation_files(tmp_path / "out", base, experiment_tokenizer(base, config), config)
    return AutoTokenizer.from_pretrained(tmp_path / "out"), GenerationConfig.from_pretrained(tmp_path / "out")


def test_the_end_mark_of_turns_ends_generation(tmp_path: Path) -> None:
    tokenizer, settings = saved(tmp_path, CHATML, "<|im_start|>", "<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert settings.eos_token_id == [EOS, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_mark_that_the_base_knows_ends_generation(tmp_path: Path) -> None:
    """Also one that its tokenizer does not count among the special tokens."""
    known = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    known.add_tokens(["<|im_end|>"])
    known.save_pretrained(tmp_path / "known")
    tokenizer, settings = saved(tmp_path, CHATML, base=tmp_path / "known")
    assert tokenizer.eos_token == "<|im_end|>"
    assert settings.eos_token_id == [EOS, known.convert_tokens_to_ids("<|im_end|>")]


def test_the_settings_of_the_base_are_kept(tmp_path: Path) -> None:
    """Also those that transformers would not write."""
    given = {"eos_token_id": [7, 9], "temperature": 0.5, "do_sample": False, "pad_token_id": 3}
    tokenizer, settings = saved(tmp_path, CHATML, "<|im_end|>", settings=given)
    assert settings.eos_token_id == [EOS, 7, 9, tokenizer.eos_token_id]
    assert (settings.temperature, settings.pad_token_id) == (0.5, 3)


@pytest.mark.parametrize("template", [None, FAMILIES["[INST], system inside the first turn"].template, SYSTEM_ONLY])
def test_without_a_mark_of_its_own_the_eos_token_ends_generation(tmp_path: Path, template: str | None) -> None:
    tokenizer, settings = saved(tmp_path, template)
    assert (tokenizer.eos_token, settings.eos_token_id) == ("</s>", [EOS])


def test_the_first_of_several_marks_ends_a_turn(tmp_path: Path) -> None:
    tokenizer, settings = saved(tmp_path, TOOL_FAMILIES["Phi"].template, "<|user|>", "<|assistant|>", "<|end|>")
    assert tokenizer.eos_token == "</s>", "the mark ends turns, and the last turn ends in EOS too"
    assert settings.eos_token_id == [EOS, tokenizer.convert_tokens_to_ids("<|end|>")]


def test_the_eos_token_stays_where_the_template_writes_it_elsewhere(tmp_path: Path) -> None:
    template = "{{ eos_token }}" + CHATML
    tokenizer, settings = saved(tmp_path, template, "<|im_end|>")
    assert tokenizer.eos_token == "</s>"
    assert settings.eos_token_id == [EOS, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_mark_of_ordinary_text_is_known_as_text(tmp_path: Path) -> None:
    tokenizer, settings = saved(tmp_path, CHATML)
    assert settings.eos_token_id == [EOS]
    config = ExperimentConfig(
        model=Model(base_model="x"), data=Data(prompt_template=PromptTemplate(chat_template=True))
    )
    assert experiment_turn_end(tokenizer, config).text.strip() == "<|im_end|>"
    assert experiment_turn_end(tokenizer, config).tokens == ()


@pytest.mark.parametrize("pieces", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("prompt", ["<s>[INST] {instruction} [/INST] ", "[INST] {instruction} [/INST]"])
@pytest.mark.parametrize("add_eos", [True, False])
def test_the_model_cards_lines_tokenize_a_prompt_as_in_training(
    tmp_path: Path, pieces: str, prompt: str, add_eos: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)
    template, tokenization = PromptTemplate(prompt_no_input=prompt), Tokenization(add_eos_token=add_eos)
    config = ExperimentConfig(
        model=Model(base_model="x"), data=Data(prompt_template=template, tokenization=tokenization)
    )
    (expected,) = questions(["What ...?"], tokenizer, config.data)
    save_generation_files(tmp_path, PACKAGED["demo-base"], tokenizer, config)
    scope: dict[str, Any] = {"tokenizer": AutoTokenizer.from_pretrained(tmp_path)}
    exec(PROMPT_LINES, scope)
    assert scope["inputs"]["input_ids"][0].tolist() == expected


def test_an_adapter_of_an_earlier_version_is_given_its_chat_template(tmp_path: Path) -> None:
    """Its own file, of the base model, is not used. The template is that of an adapter stored now."""
    (stored,) = (ROOT / "tests" / "artifacts" / "old_store" / "store" / "tests" / "adapters").glob("*/*-*")
    adapter = Path(shutil.copytree(stored, tmp_path / "adapter"))
    assert not (adapter / "chat_template.jinja").exists()
    (adapter / "chat_template.jinja").write_text(CHATML)
    tokenizer, config = adapter_tokenizer(adapter), load_resolved(adapter / "config.yaml")
    save_generation_files(tmp_path / "now", adapter, experiment_tokenizer(adapter, config), config)
    assert tokenizer.chat_template == (tmp_path / "now" / "chat_template.jinja").read_text()
    (expected,) = questions(["Which?"], tokenizer, config.data)
    messages = [{"role": "user", "content": "Which?"}]
    assert tokenizer.apply_chat_template(messages, return_dict=False) == expected


def test_the_template_of_the_base_is_not_that_of_an_adapter_with_prompts(tmp_path: Path) -> None:
    """Nor any other of the templates of the base, of which a server would choose one for tools."""
    base = Path(shutil.copytree(PACKAGED["demo-base"], tmp_path / "base"))
    (base / "chat_template.jinja").write_text(CHATML)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(CHATML)
    config = ExperimentConfig(model=Model(base_model="x"))
    tokenizer = experiment_tokenizer(base, config)
    assert {*tokenizer.chat_template} == {"default", "tool_use"}
    save_generation_files(tmp_path / "out", base, tokenizer, config)
    assert [path.name for path in (tmp_path / "out").rglob("*.jinja")] == ["chat_template.jinja"]
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = saved.apply_chat_template([{"role": "user", "content": "Which?"}], tokenize=False)
    assert prompt == "<s>" + config.data.prompt_template.prompt_no_input.format(instruction="Which?")
