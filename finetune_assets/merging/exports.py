"""Writes the GGUF files of a merged model and its Modelfile, and compares each file with base plus adapter."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finetune_assets.config.schema import Merge
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.contenders import Contender
from finetune_assets.evaluation.rows import HeldOut
from finetune_assets.merging import modelfile
from finetune_assets.merging.gguf import FOLDER, export, load_exported
from finetune_assets.merging.gguf_tokenizer import check_tokens
from finetune_assets.merging.merge import LogitDifference, Row, difference
from finetune_assets.training.generation_files import GENERATION


def export_all(
    folder: Path,
    contender: Contender,
    settings: Merge,
    held_out: HeldOut,
    rows: list[Row],
    expected: list[Tensor],
    device: torch.device,
) -> dict[str, LogitDifference]:
    """Write the GGUF files that the settings name, and measure how far their logits are from base plus adapter.

    Args:
        folder: Folder of the merged model.
        contender: The adapter.
        settings: Settings with the formats.
        held_out: Held-out rows.
        rows: Rows to compare.
        expected: Logits of base plus adapter on them.
        device: Device to compute on.

    Returns:
        Difference of the logits, by format.

    Raises:
        ExportError: if a file cannot be exact, or its tokenizer gives other tokens.
    """
    tokenizer = load_tokenizer(str(folder))
    texts = [str(tokenizer.decode(row.ids)) for row in rows]
    differences = {}
    for kind in settings.gguf or ():
        path = export(folder, kind, tokenizer, _ends(folder, tokenizer), _begins(held_out, tokenizer))
        check_tokens(path, tokenizer, texts)
        differences[kind] = difference(load_exported(path, device), rows, expected, device)
    if settings.gguf and settings.modelfile:
        template = modelfile.template_of(contender.config, tokenizer)
        stops = [tokenizer.decode([index]) for index in _ends(folder, tokenizer)]
        name = f"model-{settings.gguf[0]}.gguf"
        text = modelfile.modelfile(name, template, stops)
        (folder / FOLDER / modelfile.NAME).write_text(text, encoding="utf-8")
    return differences


def _ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end an answer, the tokenizer's EOS token first."""
    settings = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
    ends = settings.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return sorted(ids, key=lambda index: (index != tokenizer.eos_token_id, index))


def _begins(held_out: HeldOut, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the prompts of the training begin with the BOS token."""
    prompts = held_out.prompts
    return bool(prompts) and all(prompt[:1] == [tokenizer.bos_token_id] for prompt in prompts)
