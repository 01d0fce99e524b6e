"""Embedding rows for the tokens that an experiment adds; the adapter trains and stores these rows."""

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
    """Tokens with trained embedding rows.

    Attributes:
        texts: Token texts by id, in ascending order of id.
        layers: Names of the modules with trained rows: the input embedding, and the output layer if it is not tied.
        rows: Number of rows after resizing the embeddings; None if they were not resized.
    """

    texts: dict[int, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    rows: int | None = None

    @property
    def indices(self) -> dict[str, list[int]] | None:
        """Trained rows by layer, in the format of PEFT's `trainable_token_indices`."""
        return {layer: list(self.texts) for layer in self.layers} if self.texts else None

    def describe(self) -> str:
        resized = f", resized to {self.rows:,} rows" if self.rows else ""
        return f"{len(self.texts):,} new tokens, trained as rows of {' and '.join(self.layers)}{resized}"


def experiment_tokenizer(folder: Path, config: ExperimentConfig, own_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model folder, with the tokens that the experiment adds.

    Args:
        folder: Folder of the base model.
        config: Settings, possibly those of an artifact.
        own_code: Run the Python code in the folder, because the experiment trusts this version.
    """
    return load_tokenizer(str(folder), config.data.tokenization.added_tokens, trust_remote_code=own_code)


def resize_embeddings(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ExperimentConfig) -> NewTokens:
    """Ensure that every token has an embedding row; new rows are initialized with the mean of the existing rows.

    The trained rows are those of `added_tokens`, some of which may use spare rows of the base model, and all rows that
    the base model lacks.

    Raises:
        ModelError: if the adapter cannot train or save these rows.
    """
    vocabulary = tokenizer.get_vocab()
    old_rows, new_rows = base.get_input_embeddings().weight.shape[0], max(vocabulary.values()) + 1
    added = {vocabulary[token] for token in config.data.tokenization.added_tokens}
    new = {i: token for token, i in sorted(vocabulary.items(), key=lambda item: item[1]) if i in added or i >= old_rows}
    if not new:
        return NewTokens()
    _check_rows_can_be_saved(base, config, resized=new_rows > old_rows)
    if new_rows > old_rows:
        _resize(base, old_rows, new_rows)
    tied = _tied(base)
    embeddings = [base.get_input_embeddings()] if tied else [base.get_input_embeddings(), base.get_output_embeddings()]
    names = {module: name for name, module in base.named_modules()}
    return NewTokens(new, tuple(names[module] for module in embeddings), new_rows if new_rows > old_rows else None)


def _tied(base: PreTrainedModel) -> bool:
    output = base.get_output_embeddings()
    return output is None or output.weight is base.get_input_embeddings().weight


def _check_rows_can_be_saved(base: PreTrainedModel, config: ExperimentConfig, resized: bool) -> None:
    tokens, lora = [*config.data.tokenization.added_tokens], config.lora
    subject = f"{SETTING}: {tokens}" if tokens else "model.base_model: tokens without an embedding"
    scheme = lora.init_lora_weights
    if isinstance(scheme, str) and scheme.startswith(REWRITES_BASE):
        raise ModelError(
            f"{subject} cannot be trained with lora.init_lora_weights {scheme}: the adapter could not be saved; set "
            "lora.init_lora_weights to true"
        )
    embeddings = {base.get_input_embeddings(), base.get_output_embeddings()}
    last_names = {name.rpartition(".")[2] for name, module in base.named_modules() if module in embeddings}
    targets = lora.target_modules if isinstance(lora.target_modules, list) else []
    for setting, names in (("modules_to_save", lora.modules_to_save or []), ("target_modules", targets)):
        for name in names:
            if name.rpartition(".")[2] in last_names:
                raise ModelError(
                    f"{subject} conflict with lora.{setting}: rows of {name} cannot be trained both individually and "
                    "as a whole; remove one of the two"
                )
    if getattr(base.get_output_embeddings(), "bias", None) is not None:
        # peft 0.21: TrainableTokensLayer computes a linear layer without its bias
        raise ModelError(f"{subject} cannot be trained: the model's output layer has a bias, which PEFT would ignore")
    if resized and getattr(base.config, "tie_word_embeddings", False) and not _tied(base):
        raise ModelError(
            "model.base_model: config.json sets tie_word_embeddings, but the weights have a separate output layer, "
            f"which resizing for {SETTING} would replace; set tie_word_embeddings to false in the folder's config.json"
        )


@torch.no_grad()
def _resize(base: PreTrainedModel, old_rows: int, new_rows: int) -> None:
    """Resize the embeddings and set each new row to the mean of the old rows.

    The mean is close to what transformers samples (with the covariance scaled by 1e-9), but it is identical on every
    process and device, and does not require the eigenvalues of a matrix of hidden size squared.
    """
    base.resize_token_embeddings(new_rows, mean_resizing=False)
    for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
        if isinstance(layer, nn.Module):
            weight = layer.get_parameter("weight")
            weight[old_rows:] = weight[:old_rows].mean(0, dtype=torch.float32)


def check_begins_with_same(new: NewTokens, warm_start: Path) -> None:
    """Check that the warm-start adapter was trained with the same added tokens.

    Raises:
        ModelError: if the tokens differ; the message lists both.
    """
    trained = getattr(PeftConfig.from_pretrained(str(warm_start)), "trainable_token_indices", None) or []
    ids = sorted({i for indices in (trained.values() if isinstance(trained, dict) else [trained]) for i in indices})
    tokens = load_tokenizer(str(warm_start)).convert_ids_to_tokens(ids) if ids else []
    if dict(zip(ids, tokens, strict=True)) != new.texts:
        raise ModelError(
            f"training.warm_start: the adapter was trained with the tokens {tokens}, but {SETTING} results in "
            f"{list(new.texts.values())}; set {SETTING} to the tokens of the adapter, in the same order"
        )
