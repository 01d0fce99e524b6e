"""Builds the files of a tokenized dataset, and compares its prompts with those of servers.

Both need the tokenizer libraries, so the assets call them in a process of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune_assets.config.schema import Data
from finetune_assets.data.encoding import Contexts
from finetune_assets.data.learning import Learning
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.preview import masked_tokens
from finetune_assets.data.prompt_boundary import PromptBoundary, prompt_boundary
from finetune_assets.data.raw_files import RawPart
from finetune_assets.data.rows import Split
from finetune_assets.data.tokenization import check_positions, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Passages(Protocol):
    """Passages of the experiment's document set; it can be pickled."""

    @property
    def needs_torch(self) -> bool: ...
    def contexts(self, tokenizer: "PreTrainedTokenizerBase", raw: Sequence[Path]) -> Contexts: ...
    def statistics(self, dataset: Path) -> dict[str, dict[str, int]]: ...


@dataclass(frozen=True)
class Built:
    """What is known of a dataset that was built.

    Attributes:
        statistics: `Statistics` as a dictionary.
        preview: The first examples in Markdown.
        prompts: Its prompts, compared with those of servers.
    """

    statistics: dict[str, Any]
    preview: str
    prompts: PromptBoundary


@dataclass(frozen=True)
class Builder:
    """What all rows of an experiment are rendered and tokenized with. It can be pickled.

    Attributes:
        base_model: Local folder with the base model's tokenizer files and `config.json`.
        data: Data settings of the experiment.
        trusted: Whether the tokenizer's own code may run.
        split_salt: Salt of the content hashes.
        learning: What the training learns from.
        passages: Replaces the contexts of the rows; None without `data.retrieval`.
    """

    base_model: Path
    data: Data
    trusted: bool
    split_salt: str
    learning: Learning
    passages: Passages | None = None

    @property
    def needs_torch(self) -> bool:
        """Whether code is run that may import torch: that of a tokenizer, or the model of an index."""
        return self.trusted or (self.passages is not None and self.passages.needs_torch)

    def build(self, parts: Sequence[RawPart], out: Path) -> "Built":
        """Write the examples of the raw data into an empty folder, and compare the prompts.

        Raises:
            DataError: as `prepare_dataset` does, or because the tokenizer or model does not suit the settings.
        """
        check_positions(self.base_model, self.data)
        tokenizer = self._tokenizer()
        files = [part.file for part in parts]
        contexts = self._contexts(tokenizer, files)
        found = prepare_dataset(parts, tokenizer, self.data, self.split_salt, out, contexts, self.learning)
        statistics = found.to_dict()
        if self.passages:
            statistics["passages"] = self.passages.statistics(out)
        train = out / f"{Split.TRAIN}.arrow"
        preview = masked_tokens(train, tokenizer)
        return Built(statistics, preview, self._compared(files, train, contexts))

    def compare_prompts(self, raw: Sequence[Path], train: Path) -> PromptBoundary:
        """Compare the prompts of training rows with those that a server renders.

        Args:
            raw: Parquet files of the raw data.
            train: Arrow stream of the train split.
        """
        return self._compared(raw, train, self._contexts(self._tokenizer(), raw))

    def _contexts(self, tokenizer: "PreTrainedTokenizerBase", raw: Sequence[Path]) -> Contexts | None:
        return self.passages.contexts(tokenizer, raw) if self.passages else None

    def _compared(self, raw: Sequence[Path], train: Path, contexts: Contexts | None) -> PromptBoundary:
        """The comparison with a tokenizer of its own, whose chat template it replaces."""
        return prompt_boundary(train, raw, self._tokenizer(), self.data, contexts=contexts)

    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(str(self.base_model), self.data.tokenization.added_tokens, self.trusted)
