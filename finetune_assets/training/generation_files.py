"""Files that users' code generates with: tokenizer and generation settings of an adapter or merged model."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_assets.artifacts.layout import CONFIG
from finetune_assets.config.loading import load_resolved
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.chat.turn_end import TURNS, TurnEnd, turn_end
from finetune_assets.data.serving_template import use_serving_template
from finetune_assets.data.tokenization import load_tokenizer

GENERATION = "generation_config.json"


def experiment_turn_end(tokenizer: PreTrainedTokenizerBase, config: ExperimentConfig) -> TurnEnd:
    """How an answer of the experiment ends beside the tokenizer's EOS token."""
    return turn_end(tokenizer) if config.data.prompt_template.chat_template else TurnEnd()


def adapter_tokenizer(adapter: Path, own_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a stored adapter with the chat template that renders plain messages as in training.

    Adapters stored by earlier versions have no such template; it is determined by their tokenizer and settings.

    Args:
        adapter: Folder of the adapter.
        own_code: Run the Python code in the folder, if the tokenizer requires it.
    """
    tokenizer = load_tokenizer(str(adapter), trust_remote_code=own_code)
    return use_serving_template(tokenizer, load_resolved(adapter / CONFIG).data)


def save_generation_files(
    output: Path, base_folder: Path, tokenizer: PreTrainedTokenizerBase, config: ExperimentConfig
) -> None:
    """Write tokenizer, chat template and `generation_config.json`, so that users generate as in training.

    The chat template renders plain messages as in training, and generation stops where answers ended in training.
    The generation settings are those of the base model, with the end mark of the chat template's turns as another EOS
    token. It becomes the tokenizer's EOS token too, unless the chat template writes the tokenizer's EOS token
    elsewhere.

    Args:
        output: Folder to write to.
        base_folder: Folder of the base model.
        tokenizer: The experiment's tokenizer.
        config: The resolved configuration.
    """
    ends = experiment_turn_end(tokenizer, config).tokens
    use_serving_template(tokenizer, config.data)
    settings = _json(base_folder / GENERATION)
    base_ends = settings.get("eos_token_id", _json(base_folder / "config.json").get("eos_token_id"))
    known = base_ends if isinstance(base_ends, list) else [base_ends]
    stops = {*ends, *known, tokenizer.eos_token_id} - {None}
    if stops:
        settings["eos_token_id"] = sorted(stops)
    if ends and tokenizer.eos_token_id not in ends:
        _end_with(tokenizer, ends[0])
    tokenizer.save_pretrained(output)
    (output / GENERATION).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _end_with(tokenizer: PreTrainedTokenizerBase, token: int) -> None:
    """Make a token the tokenizer's EOS token if prompts stay the same."""

    def prompt() -> str:
        turns = [*TURNS, TURNS[0]]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    before, eos = prompt(), tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    if prompt() != before:
        tokenizer.eos_token = eos
