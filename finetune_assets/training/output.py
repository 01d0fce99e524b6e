"""What a training leaves behind: a folder that PEFT loads, and that says where it comes from."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from peft import PeftConfig, PeftModel

from finetune_assets.artifacts.layout import CARD, CONFIG, NOT_ON_THE_HUB, PROVENANCE, TRAINER_STATE, write_sums
from finetune_assets.artifacts.update_spectrum import write_updates
from finetune_assets.config.loading import dump
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.training.embeddings import experiment_tokenizer
from finetune_assets.training.telemetry import hardware_name
from finetune_assets.training.updates import updates

VERSIONS = ("finetune-assets", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")


def save(
    output: Path,
    model: PeftModel,
    base_folder: Path,
    config: ExperimentConfig,
    made_from: dict[str, Any],
    state: dict[str, Any],
    initial_adapter: Path | None,
    rows: int | None,
) -> None:
    """Write adapter, tokenizer, resolved configuration, trainer state, provenance and model card.

    Args:
        output: The folder to write.
        model: The trained model.
        base_folder: Where the tokenizer comes from; the experiment's own tokens are added to it.
        config: The resolved configuration.
        made_from: The inputs' fingerprints; `base_model` and `revision` name the base.
        state: The trainer's state and log.
        initial_adapter: With an initialisation that rewrote the base: the adapter as it was first, so that what is
            saved fits the base as published.
        rows: What the embeddings were resized to, which whoever loads the adapter must do too; None if they were not.
    """
    initial = {"path_initial_model_for_weight_conversion": str(initial_adapter)} if initial_adapter else {}
    # "auto" would write the whole embedding where it was resized, and compare it with the Hub's to know that
    model.save_pretrained(output, save_embedding_layers=False, **initial)
    _name_base(output, made_from)
    experiment_tokenizer(base_folder, config).save_pretrained(output)
    (output / CONFIG).write_text(dump(config), encoding="utf-8")
    _write_json(output / TRAINER_STATE, state)
    provenance = {**made_from, "versions": _versions(), "hardware": _hardware()}
    _write_json(output / PROVENANCE, provenance)
    write_updates(updates(output), output)
    (output / CARD).write_text(_model_card(config, provenance, state, rows), encoding="utf-8")
    write_sums(output)


def _name_base(output: Path, made_from: dict[str, Any]) -> None:
    """Name the base as the world knows it; PEFT wrote the folder that it was read from."""
    adapter = PeftConfig.from_pretrained(output)
    adapter.base_model_name_or_path, adapter.revision = made_from["base_model"], made_from["revision"]
    adapter.save_pretrained(output)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> str:
    return hardware_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _base(made_from: dict[str, Any]) -> str:
    repo = made_from["base_model"]
    if repo.startswith(NOT_ON_THE_HUB):
        return f'"the folder of {repo}"  # where the asset cached_base_model lies'
    return f"{repo!r}  # trained at revision {made_from['revision']}"


def _prompt(config: ExperimentConfig) -> str:
    template = config.data.prompt_template
    if template.chat_template:
        turn = '[{"role": "user", "content": "What ...?"}]'
        return f"prompt = tokenizer.apply_chat_template({turn}, tokenize=False, add_generation_prompt=True)"
    form = f'prompt = {template.prompt_no_input!r}.format(instruction="What ...?")'
    ends_in_space = template.prompt_no_input != template.prompt_no_input.rstrip(" ")
    # Tokenizers merge that space with the answer's first word, as they did in training
    return f"{form}.rstrip(' ')" if ends_in_space else form


def _special(config: ExperimentConfig) -> str:
    return ", add_special_tokens=False" if config.data.prompt_template.chat_template else ""


def _loading(config: ExperimentConfig, rows: int | None) -> str:
    own_code = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    lines = [
        f"tokenizer = AutoTokenizer.from_pretrained(adapter{own_code})",
        f"model = AutoModelForCausalLM.from_pretrained(base{own_code})",
    ]
    if rows:
        lines.append(f"model.resize_token_embeddings({rows})  # room for the tokens that the adapter brings")
    return "\n".join([*lines, "model = PeftModel.from_pretrained(model, adapter)"])


def _model_card(config: ExperimentConfig, provenance: dict[str, Any], state: dict[str, Any], rows: int | None) -> str:
    repo, held_out = provenance["base_model"], state["held_out_loss"]
    known = not repo.startswith(NOT_ON_THE_HUB)
    header = ModelCardData(
        base_model=repo if known else None,  # the Hub takes no other names
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", f"base_model:adapter:{repo}"] if known else ["lora"],
    )
    facts = {
        "base model": f"`{repo}` at `{provenance['revision']}`",
        "base model's fingerprint": _code(provenance.get("cached_base_model")),
        "dataset's fingerprint": _code(provenance.get("tokenized_dataset")),
        "raw data's fingerprint": _code(provenance.get("dolly_raw")),
        "this adapter's fingerprint": _code(provenance.get("fingerprint")),
        "combined from": _combined(provenance.get("champions") or {}),
        "initialized from": _code(provenance.get("warm_start")),
        "settings of one run alone": ", ".join(provenance.get("overrides") or []),
        **(_trained(config, state) if state["step"] else {}),
        "held-out loss": _before_and_after(held_out) if held_out["after"] is not None else "",
        "versions": ", ".join(f"{name} {number}" for name, number in provenance["versions"].items()),
        "hardware": provenance["hardware"],
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
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "."  # this folder
base = {_base(provenance)}
{_loading(config, rows)}

{_prompt(config)}
inputs = tokenizer(prompt, return_tensors="pt"{_special(config)})
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True).strip())
```

`config.yaml` holds every setting, `provenance.json` what it was made from, `trainer_state.json` how training went.
`sha256sum --check SHA256SUMS` tells whether the files are those that were written, and `finetune adapter verify`
whether they are those of the store, and where they come from.
"""


def _trained(config: ExperimentConfig, state: dict[str, Any]) -> dict[str, str]:
    return {
        "rank, alpha, targets": f"{config.lora.rank}, {config.lora.alpha:g}, {config.lora.target_modules}",
        "trainable parameters": f"{state['trainable_parameters']:,}",
        "steps, tokens": f"{state['step']:,}, {state['tokens']:,}",
    }


def _combined(champions: dict[str, str]) -> str:
    return ", ".join(f"{name} `{fingerprint}`" for name, fingerprint in champions.items())


def _code(value: str | None) -> str:
    return f"`{value}`" if value else ""


def _before_and_after(held_out: dict[str, float | None]) -> str:
    return f"{held_out['before']:.4f} before, {held_out['after']:.4f} after"
