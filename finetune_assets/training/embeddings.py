"""Tokens that an experiment adds: their rows in the embeddings, which the adapter trains and brings along."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.config.validation import REWRITES_BASE
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.training.model import ModelError

SETTING = "data.tokenization.added_tokens"


@dataclass(frozen=True)
class NewTokens:
    """Tokens whose rows of the embeddings are trained.

    Attributes:
        texts: The tokens, by id in ascending order.
        layers: Names of the modules with such rows: the input embedding, and the output layer where it is not tied.
        rows: What the embeddings were resized to; None if they had room.
    """

    texts: dict[int, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    rows: int | None = None

    @property
    def indices(self) -> dict[str, list[int]] | None:
        """As PEFT's `trainable_token_indices` takes them."""
        return {layer: list(self.texts) for layer in self.layers} if self.texts else None

    def describe(self) -> str:
        resized = f", resized to {self.rows:,} rows" if self.rows else ""
        return f"{len(self.texts):,} new tokens, trained as rows of {' and '.join(self.layers)}{resized}"


def experiment_tokenizer(folder: Path, config: ExperimentConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model's folder with the experiment's own tokens."""
    return load_tokenizer(
        str(folder), config.data.tokenization.added_tokens, trust_remote_code=bool(config.model.trust_remote_code)
    )


def resize_embeddings(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ExperimentConfig) -> NewTokens:
    """Give every token of the experiment a row in the embeddings; rows that are made begin as the mean of the others.

    Rows that are trained are those of `added_tokens`, some of which may lie in rows that the base has to spare, and
    all that it lacks.

    Raises:
        ModelError: if the adapter could not train or save such rows.
    """
    vocabulary = tokenizer.get_vocab()
    had, needs = base.get_input_embeddings().weight.shape[0], max(vocabulary.values()) + 1
    added = {vocabulary[token] for token in config.data.tokenization.added_tokens}
    new = {i: token for token, i in sorted(vocabulary.items(), key=lambda item: item[1]) if i in added or i >= had}
    if not new:
        return NewTokens()
    _refuse_what_cannot_be_saved(base, config, resized=needs > had)
    if needs > had:
        _resize(base, had, needs)
    tied = _tied(base)
    embeddings = [base.get_input_embeddings()] if tied else [base.get_input_embeddings(), base.get_output_embeddings()]
    names = {module: name for name, module in base.named_modules()}
    return NewTokens(new, tuple(names[module] for module in embeddings), needs if needs > had else None)


def _tied(base: PreTrainedModel) -> bool:
    output = base.get_output_embeddings()
    return output is None or output.weight is base.get_input_embeddings().weight


def _refuse_what_cannot_be_saved(base: PreTrainedModel, config: ExperimentConfig, resized: bool) -> None:
    tokens, lora = [*config.data.tokenization.added_tokens], config.lora
    why = f"{SETTING}: {tokens}" if tokens else "model.base_model: tokens without an embedding"
    scheme = lora.init_lora_weights
    if isinstance(scheme, str) and scheme.startswith(REWRITES_BASE):
        raise ModelError(
            f"{why} cannot be trained with lora.init_lora_weights {scheme}, whose adapter could not be saved; set it "
            "to true"
        )
    embeddings = {base.get_input_embeddings(), base.get_output_embeddings()}
    last_names = {name.rpartition(".")[2] for name, module in base.named_modules() if module in embeddings}
    targets = lora.target_modules if isinstance(lora.target_modules, list) else []
    for setting, names in (("modules_to_save", lora.modules_to_save or []), ("target_modules", targets)):
        for name in names:
            if name.rpartition(".")[2] in last_names:
                raise ModelError(f"{why} trains single rows, lora.{setting} all of {name}; take one of the two")
    if getattr(base.get_output_embeddings(), "bias", None) is not None:
        # peft 0.21: TrainableTokensLayer computes a linear layer without its bias
        raise ModelError(f"{why} cannot be trained: this model's output layer has a bias, which PEFT would leave out")
    if resized and getattr(base.config, "tie_word_embeddings", False) and not _tied(base):
        raise ModelError(
            "model.base_model: its config.json says tie_word_embeddings, its weights have an output layer of their own "
            f"that resizing for {SETTING} would replace; set tie_word_embeddings to false in the folder's config.json"
        )


@torch.no_grad()
def _resize(base: PreTrainedModel, had: int, needs: int) -> None:
    """The mean of the old rows is near what transformers draws (their covariance scaled by 1e-9), but the same for
    every process and device, and without the eigenvalues of a hidden size squared."""
    base.resize_token_embeddings(needs, mean_resizing=False)
    for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
        if isinstance(layer, nn.Module):
            weight = layer.get_parameter("weight")
            weight[had:] = weight[:had].mean(0, dtype=torch.float32)


def check_begins_with_same(new: NewTokens, warm_start: Path) -> None:
    """Refuse to begin from an adapter that trained the rows of other tokens.

    Raises:
        ModelError: naming both.
    """
    found = getattr(PeftConfig.from_pretrained(str(warm_start)), "trainable_token_indices", None) or []
    ids = sorted({i for indices in (found.values() if isinstance(found, dict) else [found]) for i in indices})
    theirs = load_tokenizer(str(warm_start)).convert_ids_to_tokens(ids) if ids else []
    if dict(zip(ids, theirs, strict=True)) != new.texts:
        raise ModelError(
            f"training.warm_start: that adapter trained the tokens {theirs}, {SETTING} makes it "
            f"{list(new.texts.values())}; set {SETTING} to the former, in their order"
        )
