"""Held-out rows for evaluation, rendered with the prompt template and tokenizer of each contender's experiment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from finetune_assets.config.fingerprint import fingerprint, identity
from finetune_assets.config.schema import Data, ExperimentConfig
from finetune_assets.data.errors import RefusedRow
from finetune_assets.data.raw_files import rows_at
from finetune_assets.data.rows import HoldoutRows, Row, rejected_side
from finetune_assets.data.tokenization import IGNORED, Encoder
from finetune_assets.training.order import Examples


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows in the rendering of one contender.

    Attributes:
        examples: Tokenized rows; only the tokens of the answer are learned.
        whole: Mask of the rows with an untruncated answer, on which loss sums of different renderings are comparable;
            shape (rows,).
    """

    examples: Examples
    whole: NDArray[np.bool_]

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids up to the last answer, for each row."""
        lengths = self.examples.table["prompt_length"].to_pylist()
        return [ids[:length] for ids, length in zip(self.examples.ids.to_pylist(), lengths, strict=True)]

    @property
    def answers(self) -> list[list[int]]:
        """Token ids of the last answer including its end token, for each row."""
        lengths = self.examples.table["prompt_length"].to_pylist()
        return [ids[length:] for ids, length in zip(self.examples.ids.to_pylist(), lengths, strict=True)]

    def take(self, chosen: NDArray[np.int64]) -> "HeldOut":
        """Some of the rows, in the same rendering."""
        return HeldOut(Examples(self.examples.table.take(pa.array(chosen))), self.whole[chosen])


def held_out(dataset: Path, split: str, data: Data) -> HeldOut:
    """Read the rows of one split of a tokenized dataset."""
    table = Examples.read(dataset / f"{split}.arrow").table
    if data.tokenization.train_on_inputs:
        table = _mask_prompts(table)
    examples = Examples(table)
    return HeldOut(examples, examples.lengths < data.tokenization.cutoff_len)


def _mask_prompts(table: pa.Table) -> pa.Table:
    """Mask the prompts, so that `train_on_inputs` of one experiment does not change what is compared."""
    labels = [
        [IGNORED] * length + ids[length:]
        for ids, length in zip(table["labels"].to_pylist(), table["prompt_length"].to_pylist(), strict=True)
    ]
    column = table.schema.get_field_index("labels")
    return table.set_column(column, "labels", pa.array(labels, pa.list_(pa.int32())))


def rendering(config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a fingerprint of how rows become tokens; equal if both settings and tokenizer give the same tokens."""
    template, tokens = config.data.prompt_template, config.data.tokenization
    return fingerprint(
        template=identity(template),
        chat=str(tokenizer.chat_template) if template.chat_template else None,
        tokens=[tokens.cutoff_len, tokens.add_eos_token, list(tokens.added_tokens)],
        tokenizer=tokenizer.backend_tokenizer.to_str(),  # type: ignore[attr-defined]
    )


def rendered(raw_rows: Sequence[Row | RefusedRow], tokenizer: PreTrainedTokenizerBase, data: Data) -> HeldOut:
    """Render rows of the raw data with the prompt template and tokenizer of an experiment.

    A row that the template refuses, or with no answer token left, becomes an example with one learned token. Such
    rows and truncated ones are not `whole`.
    """
    data = replace(data, tokenization=replace(data.tokenization, train_on_inputs=False))
    encoded = Encoder(tokenizer, data).encode(raw_rows)
    ends = np.cumsum(encoded.lengths)
    examples: list[dict[str, Any]] = [{"input_ids": [0, 0], "labels": [IGNORED, 0], "prompt_length": 1}] * len(raw_rows)
    whole = np.zeros(len(raw_rows), bool)
    for index, row in enumerate(encoded.rows):
        span = slice(ends[index] - encoded.lengths[index], ends[index])
        labels = encoded.labels[span]
        if (labels[1:] != IGNORED).any():
            ids, length = encoded.input_ids[span], int(encoded.prompt_lengths[index])
            examples[row] = {"input_ids": ids.tolist(), "labels": labels.tolist(), "prompt_length": length}
            whole[row] = not encoded.truncated[index]
    return HeldOut(Examples(pa.Table.from_pylist(examples)), whole)


def raw_rows_of(rows: HeldOut, raw: Sequence[Path]) -> list[Row]:
    """Return the rows of the raw data that held-out rows were rendered from; of a rejected answer, with it."""
    table = rows.examples.table
    raw_rows = rows_at(raw, table["row"].to_numpy())
    if "chosen" not in table.column_names:
        return raw_rows
    sides = zip(raw_rows, table["chosen"].to_pylist(), strict=True)
    return [rejected_side(row) if chosen is False else row for row, chosen in sides]


def unseen_rows(rows: HeldOut, raw: Sequence[Path], split: str, held_back: HoldoutRows) -> NDArray[np.bool_]:
    """Return the mask of the rows of a split that are in `held_back`; shape (rows,)."""
    indices = rows.examples.table["row"].to_numpy()
    raw_rows = rows_at(raw, indices, ["instruction", "context"])
    return np.array([held_back.holds(row["instruction"], row["context"], split) for row in raw_rows], bool)


def running_text(texts: list[str], tokenizer: PreTrainedTokenizerBase, most: int, window: int) -> Examples | None:
    """Split text into examples of up to `window` tokens, all learned; None if the text is empty.

    Args:
        texts: Paragraphs or documents.
        tokenizer: Tokenizer of the contender.
        most: Maximum number of tokens in total.
        window: Maximum number of tokens per example.
    """
    examples: list[dict[str, list[int]]] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        pieces = (ids[at : at + window] for at in range(0, len(ids), window))
        for piece in pieces:
            if len(piece) > 1 and most > 1:
                piece = piece[:most]
                examples.append({"input_ids": piece, "labels": piece})
                most -= len(piece)
    return Examples(pa.Table.from_pylist(examples)) if examples else None
