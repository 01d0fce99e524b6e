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
        own_code: Run the base model's own Python code, because the experiment's settings trust its version. Settings
            stored with an adapter trust nothing.
    """

    name: str
    base_model: Path
    config: ExperimentConfig
    adapter: Path | None = None
    own_code: bool = False

    @staticmethod
    def of_folder(name: str, base_model: Path, adapter: Path, own_code: bool = False) -> "Contender":
        """Create a contender from an adapter folder, with the settings stored in it."""
        config = load_resolved(adapter / CONFIG)
        config.model.trust_remote_code = None
        return Contender(name, base_model, config, adapter, own_code)

    @property
    def base_key(self) -> str:
        """Key of the base model in memory: contenders with equal keys share it."""
        config = self.config
        tokens, precision = config.data.tokenization.added_tokens, config.training.precision
        model = {**identity(config.model), "base_model": None, "revision": None}
        folder, own_code = str(self.base_model), self.own_code
        return fingerprint(folder=folder, model=model, tokens=list(tokens), precision=precision, own_code=own_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, including the tokens that the experiment adds."""
        return experiment_tokenizer(self.base_model, self.config, self.own_code)

    def load_base(self, device: torch.device) -> PreTrainedModel:
        """Load the base model, in the settings' data type and quantization."""
        return load_base(self.base_model, self.config.model, self.config.training, device, self.own_code)


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
            self._base = contender.load_base(self.device)
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
