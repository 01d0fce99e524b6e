"""The rows that all contenders are measured on, each in the words and tokens of its own experiment."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from finetune_assets.config.fingerprint import fingerprint, identity
from finetune_assets.config.schema import Data, ExperimentConfig
from finetune_assets.data.ingest import PARQUET
from finetune_assets.data.rows import HoldoutRows
from finetune_assets.data.tokenization import IGNORED, Encoder
from finetune_assets.training.order import Examples

FIRST_WORDS = ("The", "It", "In", "A", "Yes")
"""With which answers begin."""


@dataclass(frozen=True)
class HeldOut:
    """Rows as one contender reads them.

    Attributes:
        examples: Its tokens; of what it says itself, only the answer is learned.
        whole: Of which rows that is the whole answer, so that sums can be compared with another rendering's.
    """

    examples: Examples
    whole: NDArray[np.bool_]

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of all before the last answer."""
        lengths = self.examples.table["prompt_length"].to_pylist()
        return [ids[:length] for ids, length in zip(self.examples.ids.to_pylist(), lengths, strict=True)]

    @property
    def answers(self) -> list[list[int]]:
        """Token ids of the last answer and its end."""
        lengths = self.examples.table["prompt_length"].to_pylist()
        return [ids[length:] for ids, length in zip(self.examples.ids.to_pylist(), lengths, strict=True)]


def held_out(dataset: Path, split: str, data: Data) -> HeldOut:
    """The rows of one side of a tokenized dataset."""
    table = Examples.read(dataset / f"{split}.arrow").table
    if data.tokenization.train_on_inputs:
        table = _answers_alone(table)
    examples = Examples(table)
    return HeldOut(examples, examples.lengths < data.tokenization.cutoff_len)


def _answers_alone(table: pa.Table) -> pa.Table:
    """What an experiment learns of its prompts too would be counted for it, and not for another."""
    labels = [
        [IGNORED] * length + ids[length:]
        for ids, length in zip(table["labels"].to_pylist(), table["prompt_length"].to_pylist(), strict=True)
    ]
    at = table.schema.get_field_index("labels")
    return table.set_column(at, "labels", pa.array(labels, pa.list_(pa.int32())))


def rendering(config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Differs between experiments that make different tokens of the same row."""
    template, tokens = config.data.prompt_template, config.data.tokenization
    return fingerprint(
        template=identity(template),
        chat=str(tokenizer.chat_template) if template.chat_template else None,
        tokens=[tokens.cutoff_len, tokens.add_eos_token, list(tokens.added_tokens)],
        tokenizer=tokenizer.backend_tokenizer.to_str(),  # type: ignore[attr-defined]
    )


def rendered_again(rows: HeldOut, raw: Path, tokenizer: PreTrainedTokenizerBase, data: Data) -> HeldOut:
    """The same rows of the raw data in another experiment's words.

    A row that it has no words for, or only a part of, stays as an example of one learned token, and not `whole`.
    """
    data = replace(data, tokenization=replace(data.tokenization, train_on_inputs=False))
    indices = rows.examples.table["row"].to_numpy()
    texts = pq.read_table(raw / PARQUET).take(pa.array(indices)).to_pylist()
    encoded = Encoder(tokenizer, data).encode(texts)
    ends = np.cumsum(encoded.lengths)
    examples: list[dict[str, Any]] = [{"input_ids": [0, 0], "labels": [IGNORED, 0], "prompt_length": 1}] * len(texts)
    whole = np.zeros(len(texts), bool)
    for place, row in enumerate(encoded.rows):
        part = slice(ends[place] - encoded.lengths[place], ends[place])
        labels = encoded.labels[part]
        if (labels[1:] != IGNORED).any():
            ids, length = encoded.input_ids[part], int(encoded.prompt_lengths[place])
            examples[row] = {"input_ids": ids.tolist(), "labels": labels.tolist(), "prompt_length": length}
            whole[row] = not encoded.truncated[place]
    return HeldOut(Examples(pa.Table.from_pylist(examples)), whole)


def unseen_rows(rows: HeldOut, raw: Path, split: str, held_back: HoldoutRows) -> NDArray[np.bool_]:
    """Which rows of a side of the split are held back; shape (rows,)."""
    indices = rows.examples.table["row"].to_numpy()
    texts = pq.read_table(raw / PARQUET, columns=["instruction", "context"]).take(pa.array(indices)).to_pylist()
    return np.array([held_back.holds(text["instruction"], text["context"], split) for text in texts], bool)


def questions(prompts: list[str], tokenizer: PreTrainedTokenizerBase, data: Data) -> list[list[int]]:
    """A person's own questions as token ids, up to where the answer begins.

    Where that is depends on the answer's first word, with which a tokenizer may or may not merge the space before it;
    what most words lead to is what training has mostly seen.
    """
    blank = {"context": "", "category": "", "messages": None}
    rows = [{**blank, "instruction": prompt, "response": word} for prompt in prompts for word in FIRST_WORDS]
    encoded = Encoder(tokenizer, data).encode(rows)
    starts = np.cumsum(encoded.lengths) - encoded.lengths
    spans = zip(starts, encoded.prompt_lengths, strict=True)
    found = [tuple(encoded.input_ids[start : start + length].tolist()) for start, length in spans]
    each = len(FIRST_WORDS)
    return [[*Counter(found[at : at + each]).most_common(1)[0][0]] for at in range(0, len(found), each)]


def running_text(texts: list[str], tokenizer: PreTrainedTokenizerBase, most: int, window: int) -> Examples | None:
    """Text as examples of up to `window` tokens, each of which is learned; None if there is none.

    Args:
        texts: Paragraphs or documents.
        tokenizer: The contender's.
        most: Tokens in all.
        window: Tokens of an example.
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
