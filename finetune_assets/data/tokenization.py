"""From text to token ids with labels. The prompt is masked by the tokens' own offsets, never by tokenizing it alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_assets.config.schema import Data
from finetune_assets.data.prompts import Row, make_renderer
from finetune_assets.data.sources import DataError

IGNORED = -100
"""Label of a token that is not learned, as PyTorch's cross-entropy and every trainer know it."""


@dataclass(frozen=True)
class Examples:
    """A batch of examples, their tokens end to end.

    Attributes:
        lengths: Tokens of each example; shape (n,).
        input_ids: Token ids; shape (sum of lengths,), int32.
        labels: The same ids, or `IGNORED`; same shape.
        prompt_lengths: Tokens before the first that holds a character of the response; shape (n,).
        truncated: Whether the example was cut at `cutoff_len`; shape (n,).
    """

    lengths: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    prompt_lengths: NDArray[np.int32]
    truncated: NDArray[np.bool_]


class Encoder:
    """Renders and tokenizes rows as one experiment asks for.

    Args:
        tokenizer: A fast tokenizer.
        data: The experiment's data settings.

    Raises:
        DataError: if the tokenizer is slow, or lacks an end token or chat template that the settings need.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        self.render = make_renderer(data.prompt_template, tokenizer)
        self.settings = data.tokenization
        self.whole_text = data.prompt_template.chat_template
        if not tokenizer.is_fast:
            raise DataError(f"{tokenizer.name_or_path}: has no fast tokenizer (tokenizer.json), which masking needs")
        self.backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self.backend.no_padding()  # what tokenizer.json asks for when it is used alone
        self.backend.no_truncation()
        self.eos = None if self.whole_text or not self.settings.add_eos_token else tokenizer.eos_token_id
        if self.settings.add_eos_token and not self.whole_text and self.eos is None:
            raise DataError(
                f"{tokenizer.name_or_path}: has no end-of-sequence token; set data.tokenization.add_eos_token to false"
            )

    def encode(self, rows: list[Row]) -> Examples:
        """Tokenize rows, add the end token, cut, and label."""
        rendered = [self.render(row) for row in rows]
        encodings = self.backend.encode_batch([r.text for r in rendered], add_special_tokens=not self.whole_text)
        cutoff, count = self.settings.cutoff_len, len(rows)
        lengths = np.empty(count, np.int64)
        prompts = np.empty(count, np.int32)
        truncated = np.zeros(count, np.bool_)
        ids: list[int] = []
        for i, (encoding, (text, start)) in enumerate(zip(encodings, rendered, strict=True)):
            tokens = encoding.ids
            if self.eos is not None and tokens[-1] != self.eos:
                tokens.append(self.eos)
            if len(tokens) > cutoff:
                del tokens[cutoff:]
                truncated[i] = True
            ids += tokens
            lengths[i] = len(tokens)
            prompts[i] = min(first_token_at(encoding, start, len(text)), len(tokens))
        input_ids = np.array(ids, np.int32)
        return Examples(lengths, input_ids, self._label(input_ids, lengths, prompts), prompts, truncated)

    def _label(
        self, ids: NDArray[np.int32], lengths: NDArray[np.int64], prompts: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        if self.settings.train_on_inputs:
            return ids.copy()
        ends = np.cumsum(lengths)
        place = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
        return np.where(place < np.repeat(prompts, lengths), np.int32(IGNORED), ids)


def first_token_at(encoding: Encoding, start: int, end: int) -> int:
    """The first token that holds a character of text[start:end]; the number of tokens if none does.

    A character that the tokenizer drops (a stripped space, say) belongs to no token, so the next one decides.
    """
    for character in range(start, end):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return len(encoding.ids)


def check_positions(folder: Path, data: Data) -> None:
    """Refuse a cut-off beyond the positions that the model of this folder was made for.

    Raises:
        DataError: naming both.
    """
    positions = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    cutoff = data.tokenization.cutoff_len
    if positions is not None and cutoff > positions:
        raise DataError(f"data.tokenization.cutoff_len: {cutoff} is more than the base model's {positions} positions")


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model's local folder.

    Raises:
        DataError: if there is none that loads.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f"{folder}: no tokenizer that loads: {e}") from e
