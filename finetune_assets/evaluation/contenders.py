"""The models to compare (base, champion, challenger), and loading their adapters onto one shared base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_assets.artifacts.layout import CONFIG
from finetune_assets.config.fingerprint import fingerprint, identity
from finetune_assets.config.loading import load_resolved
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.training.embeddings import experiment_tokenizer, resize_embeddings
from finetune_assets.training.lora import use_fused_lora
from finetune_assets.training.model import load_base, with_adapter_of

BASE, CHAMPION, CHALLENGER = "base", "champion", "challenger"


@dataclass(frozen=True)
class Contender:
    """A model to evaluate.

    Attributes:
        name: `base`, `champion` or `challenger`.
        base_model: Folder of the base model.
        config: Settings that the model was trained with.
        adapter: Folder of the adapter; None for the base model alone.
    """

    name: str
    base_model: Path
    config: ExperimentConfig
    adapter: Path | None = None

    @staticmethod
    def of_folder(name: str, base_model: Path, adapter: Path) -> "Contender":
        """Create a contender from an adapter folder, with the settings stored in it."""
        return Contender(name, base_model, load_resolved(adapter / CONFIG), adapter)

    @property
    def base_key(self) -> str:
        """Key of the base model in memory: contenders with equal keys share it."""
        config = self.config
        tokens, precision = config.data.tokenization.added_tokens, config.training.precision
        model = {**identity(config.model), "base_model": None, "revision": None}
        return fingerprint(folder=str(self.base_model), model=model, tokens=list(tokens), precision=precision)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, including the tokens that the experiment adds."""
        return experiment_tokenizer(self.base_model, self.config)


@dataclass
class LoadedModels:
    """Holds one base model in memory at a time; contenders ordered by `base_key` load each base once.

    Attributes:
        device: Device of the models.
        read: Folders of the base models and adapters loaded so far, in order.
    """

    device: torch.device
    read: list[Path] = field(default_factory=list)
    _taken: str = ""
    _base: PreTrainedModel | None = None

    @contextmanager
    def loaded(self, contender: Contender) -> Iterator[PeftModel | PreTrainedModel]:
        """Yield the contender's model in evaluation mode.

        Raises:
            ModelError: if base or adapter cannot be loaded, or are incompatible.
        """
        base = self._base_for(contender)
        if contender.adapter is None:
            yield base
            return
        self._base = None  # a failed load of the adapter leaves the base partly modified
        model = with_adapter_of(base, contender.adapter)
        use_fused_lora(model)
        self.read.append(contender.adapter)
        try:
            yield model
        finally:
            # Changes outside the LoRA layers remain in the base after unload(): reload it for the next contender
            self._base = None if leaves_traces(contender.adapter) else model.unload()

    def _base_for(self, contender: Contender) -> PreTrainedModel:
        if self._base is None or self._taken != contender.base_key:
            self._base = None  # free the previous base first: two must never be in memory
            self._base = load_base(contender.base_model, contender.config.model, contender.config.training, self.device)
            resize_embeddings(self._base, contender.tokenizer(), contender.config)
            self._taken = contender.base_key
            self.read.append(contender.base_model)
        return self._base.eval()


def leaves_traces(adapter: Path) -> bool:
    """Whether an adapter modifies base weights outside its LoRA layers, so that `unload()` cannot restore the base."""
    config = PeftConfig.from_pretrained(str(adapter))
    return bool(
        getattr(config, "bias", "none") != "none"
        or getattr(config, "modules_to_save", None)
        or getattr(config, "trainable_token_indices", None)
    )
