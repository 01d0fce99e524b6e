"""Who is compared: the base alone, the champion, the challenger; and the base model that they sit on in turn."""

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
    """One model to be measured.

    Attributes:
        name: `base`, `champion` or `challenger`.
        base_model: Folder of its base.
        config: The settings that it was trained with.
        adapter: Folder of its adapter; None for the base alone.
    """

    name: str
    base_model: Path
    config: ExperimentConfig
    adapter: Path | None = None

    @staticmethod
    def of_folder(name: str, base_model: Path, adapter: Path) -> "Contender":
        """An adapter with the settings that lie beside it."""
        return Contender(name, base_model, load_resolved(adapter / CONFIG), adapter)

    @property
    def seat(self) -> str:
        """Contenders of the same seat are measured on one base model in memory."""
        config = self.config
        tokens, precision = config.data.tokenization.added_tokens, config.training.precision
        model = {**identity(config.model), "base_model": None, "revision": None}
        return fingerprint(folder=str(self.base_model), model=model, tokens=list(tokens), precision=precision)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """With the tokens that its experiment adds."""
        return experiment_tokenizer(self.base_model, self.config)


@dataclass
class LoadedModels:
    """Base models in memory, one at a time; contenders in the order of their seats read each once.

    Attributes:
        device: Where they are.
        read: Folders of the models that were read, in order.
    """

    device: torch.device
    read: list[Path] = field(default_factory=list)
    _taken: str = ""
    _base: PreTrainedModel | None = None

    @contextmanager
    def seated(self, contender: Contender) -> Iterator[PeftModel | PreTrainedModel]:
        """The contender's model, in evaluation mode.

        Raises:
            ModelError: if base or adapter do not load, or not go together.
        """
        base = self._base_for(contender)
        if contender.adapter is None:
            yield base
            return
        self._base = None  # it is not whole any more if the adapter does not fit
        model = with_adapter_of(base, contender.adapter)
        use_fused_lora(model)
        self.read.append(contender.adapter)
        try:
            yield model
        finally:
            # What an adapter changes beside its own layers stays in the base, which is then read anew
            self._base = None if leaves_traces(contender.adapter) else model.unload()

    def _base_for(self, contender: Contender) -> PreTrainedModel:
        if self._base is None or self._taken != contender.seat:
            self._base = None  # first, so that two are never in memory
            self._base = load_base(contender.base_model, contender.config.model, contender.config.training, self.device)
            resize_embeddings(self._base, contender.tokenizer(), contender.config)
            self._taken = contender.seat
            self.read.append(contender.base_model)
        return self._base.eval()


def leaves_traces(adapter: Path) -> bool:
    """Whether an adapter changes more of its base than its own layers, so that it cannot be taken off again."""
    config = PeftConfig.from_pretrained(str(adapter))
    return bool(
        getattr(config, "bias", "none") != "none"
        or getattr(config, "modules_to_save", None)
        or getattr(config, "trainable_token_indices", None)
    )
