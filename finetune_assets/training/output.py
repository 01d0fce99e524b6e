"""Output folder of a training: an adapter that PEFT can load, with its provenance and a model card."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from finetune_assets.artifacts.layout import CARD, CONFIG, NOT_ON_THE_HUB, PROVENANCE, TRAINER_STATE, write_sums
from finetune_assets.artifacts.update_spectrum import write_updates
from finetune_assets.config.loading import dump
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.display import code, markdown, plain
from finetune_assets.retrieval.asking import RETRIEVAL_FILE, RetrievalFormat
from finetune_assets.training.best_step import describe_saved, published
from finetune_assets.training.embeddings import experiment_tokenizer
from finetune_assets.training.generation_files import experiment_turn_end, save_generation_files
from finetune_assets.training.telemetry import hardware_name
from finetune_assets.training.updates import updates

VERSIONS = ("finetune-assets", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")
PROMPT_LINES = """\
messages = [{"role": "user", "content": "What ...?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
"""The model card's lines that tokenize a prompt as in training."""
RETRIEVE_LINES = """\
found = Retriever(adapter, index).find("What ...?")
messages = found.messages  # the question with its passages
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
"""The model card's lines that retrieve passages for a question and tokenize them as in training."""
SHOW_SOURCES = '\nprint(*found.sources, sep="\\n")'


def save(
    output: Path,
    model: PeftModel,
    base_folder: Path,
    config: ExperimentConfig,
    made_from: dict[str, Any],
    state: dict[str, Any],
    initial_adapter: Path | None,
    rows: int | None,
    own_code: bool = False,
) -> None:
    """Write adapter, tokenizer, resolved configuration, trainer state, provenance and model card.

    Args:
        output: Output folder.
        model: The trained model.
        base_folder: Folder of the base model, which provides the tokenizer; the experiment's tokens are added to it.
        config: The resolved configuration.
        made_from: Fingerprints of the inputs; `base_model` and `revision` identify the base model.
        state: The trainer state and log.
        initial_adapter: Folder of the initial adapter, for an initialization that modified the base weights. The saved
            adapter is converted with it, so that it applies to the published base model.
        rows: Number of rows after resizing the embeddings, which is also required to load the adapter; None if they
            were not resized.
        own_code: Run the base model's own Python code, if its tokenizer requires it.
    """
    initial = {"path_initial_model_for_weight_conversion": str(initial_adapter)} if initial_adapter else {}
    # "auto" would save the whole embedding if it was resized, and query the Hub to detect that
    model.save_pretrained(output, save_embedding_layers=False, **initial)
    _name_base(output, made_from)
    tokenizer = experiment_tokenizer(base_folder, config, own_code)
    example = _generation(config, tokenizer, rows)  # of the tokenizer as in training
    save_generation_files(output, base_folder, tokenizer, config)
    (output / CONFIG).write_text(dump(config), encoding="utf-8")
    _write_json(output / TRAINER_STATE, state)
    if config.data.retrieval:
        RetrievalFormat.of_experiment(config.data, made_from.get("retrieval_index")).write(output)
    provenance = {**made_from, "versions": _versions(), "hardware": _hardware()}
    _write_json(output / PROVENANCE, provenance)
    write_updates(updates(output), output)
    (output / CARD).write_text(_model_card(config, provenance, state, example), encoding="utf-8")
    write_sums(output)


def _name_base(output: Path, made_from: dict[str, Any]) -> None:
    """Replace the local base model folder, which PEFT wrote to the adapter config, with its name and revision."""
    adapter = PeftConfig.from_pretrained(output)
    adapter.base_model_name_or_path, adapter.revision = made_from["base_model"], made_from["revision"]
    adapter.save_pretrained(output)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _hardware() -> str:
    return hardware_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _base(made_from: dict[str, Any]) -> str:
    repo = made_from["base_model"]
    if repo.startswith(NOT_ON_THE_HUB):
        folder = json.dumps(f"the folder of {plain(repo)}", ensure_ascii=False)
        return f"{folder}  # path of the cached_base_model artifact"
    return f"{repo!r}  # trained at revision {made_from['revision']}"


def _generation(config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, rows: int | None) -> str:
    """The model card's lines that load the adapter and generate an answer."""
    end = experiment_turn_end(tokenizer, config)
    stops = f", stop_strings=[{end.text.strip()!r}], tokenizer=tokenizer" if end.text.strip() and not end.tokens else ""
    return f"""{_loading(config, rows)}
settings = GenerationConfig.from_pretrained(adapter)  # stops at the end of an answer

{RETRIEVE_LINES if config.data.retrieval else PROMPT_LINES}
output = model.generate(**inputs, generation_config=settings, max_new_tokens=64, do_sample=False{stops})
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True).strip()){SHOW_SOURCES if config.data.retrieval else ""}"""


def _loading(config: ExperimentConfig, rows: int | None) -> str:
    own_code = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    lines = [
        f"tokenizer = AutoTokenizer.from_pretrained(adapter{own_code})",
        f"model = AutoModelForCausalLM.from_pretrained(base{own_code})",
    ]
    if rows:
        lines.append(f"model.resize_token_embeddings({rows})  # rows for the tokens that the adapter adds")
    return "\n".join([*lines, "model = PeftModel.from_pretrained(model, adapter)"])


def _model_card(config: ExperimentConfig, provenance: dict[str, Any], state: dict[str, Any], example: str) -> str:
    repo, held_out = provenance["base_model"], state["held_out_loss"]
    on_hub = not repo.startswith(NOT_ON_THE_HUB)
    header = ModelCardData(
        base_model=repo if on_hub else None,  # the Hub accepts only Hub repositories
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", f"base_model:adapter:{repo}"] if on_hub else ["lora"],
    )
    facts = {
        "base model": f"{code(repo)} at {code(provenance['revision'])}",
        "base model's fingerprint": _code(provenance.get("cached_base_model")),
        "dataset's fingerprint": _code(provenance.get("tokenized_dataset")),
        "raw data's fingerprint": _code(provenance.get("dolly_raw")),
        "documents": _documents(config, provenance),
        "this adapter's fingerprint": _code(provenance.get("fingerprint")),
        "combined from": _combined(provenance.get("champions") or {}),
        "initialized from": _code(provenance.get("warm_start")),
        "overrides for this run only": markdown(", ".join(provenance.get("overrides") or [])),
        **(_trained(config, state) if state["step"] else {}),
        "held-out loss": _before_and_after(held_out) if held_out["after"] is not None else "",
        "versions": ", ".join(f"{name} {number}" for name, number in provenance["versions"].items()),
        "hardware": markdown(provenance["hardware"]),
    }
    lines = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)
    return f"""---
{header.to_yaml()}
---
# LoRA adapter of experiment {provenance["experiment"]}

| | |
| --- | --- |
{lines}

```python
{_imports(config)}

adapter = "."  # this folder
base = {_base(provenance)}
{_index_line(config, provenance)}{example}
```

{_retrieval(config)}`chat_template.jinja` renders messages exactly as in training. {_messages(config)}Prompts that are
filled in by hand may have other tokens.

`config.yaml` contains all settings, `provenance.json` the inputs and library versions, `trainer_state.json` the
training log. `sha256sum --check SHA256SUMS` verifies that the files are unchanged. `finetune adapter verify` compares
them with the artifact in the store and shows their provenance.
"""


def _imports(config: ExperimentConfig) -> str:
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
    ]
    if config.data.retrieval:
        lines = ["from finetune_assets.retrieval.asking import Retriever", *lines]
    return "\n".join(lines)


def _index_line(config: ExperimentConfig, provenance: dict[str, Any]) -> str:
    if not config.data.retrieval:
        return ""
    command = f"finetune adapter fetch {provenance['experiment']} adapter --with-index"
    return f'index = "../adapter-index"  # {command}\n'


def _documents(config: ExperimentConfig, provenance: dict[str, Any]) -> str:
    """Document set and index of the training; empty without retrieval."""
    if not config.data.retrieval:
        return ""
    index = _code(provenance.get("retrieval_index"))
    return f"{code(config.data.retrieval.documents)}{f', index {index}' if index else ''}"


def _retrieval(config: ExperimentConfig) -> str:
    """The model card's sentence on passages; empty without retrieval."""
    if not config.data.retrieval:
        return ""
    return (
        f"Each question comes with up to {config.data.retrieval.passages} passages of the documents, numbered and best "
        f"first; {code(RETRIEVAL_FILE)} describes their format. Newer documents need a newer index only. "
    )


def _messages(config: ExperimentConfig) -> str:
    """The model card's sentence on the messages that the chat template takes."""
    if config.data.prompt_template.chat_template:
        return ""
    return (
        "Send one message with the role `user`, the instruction, and optionally one with the role `context` before it. "
        "Other messages are refused, because training had none. "
    )


def _trained(config: ExperimentConfig, state: dict[str, Any]) -> dict[str, str]:
    return {
        "rank, alpha, targets": f"{config.lora.rank}, {config.lora.alpha:g}, {code(config.lora.target_modules)}",
        "trainable parameters": f"{state['trainable_parameters']:,}",
        "steps, tokens": f"{state['step']:,}, {state['tokens']:,}",
        "published step": _published_step(config, state),
    }


def _published_step(config: ExperimentConfig, state: dict[str, Any]) -> str:
    """Step of the published adapter, and what stopping early saved; empty without evaluations."""
    numbers = published(state, config.hardware.price_per_hour)
    if not numbers:
        return ""
    saved = describe_saved(numbers)
    stopped = f", stopped early at step {state['step']:,} ({saved} saved)" if saved else ""
    return f"{numbers['published_step']:,} of {state['steps']:,}{stopped}"


def _combined(champions: dict[str, str]) -> str:
    return ", ".join(f"{markdown(name)} {code(fingerprint)}" for name, fingerprint in champions.items())


def _code(value: str | None) -> str:
    return code(value) if value else ""


def _before_and_after(held_out: dict[str, float | None]) -> str:
    return f"{held_out['before']:.4f} before, {held_out['after']:.4f} after"
