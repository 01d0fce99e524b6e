"""Compares the prompts that servers render with those of training.

In training, prompt and answer are tokenized together, and the prompt is what precedes the answer's first token. A
server tokenizes the prompt alone. The tokens are the same unless they merge differently where the answer begins, or the
chat template renders a prompt that it does not write in a whole conversation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from finetune_assets.config.schema import Data
from finetune_assets.data.chat import ChatTemplate
from finetune_assets.data.chat.jinja import Jinja
from finetune_assets.data.dataset_statistics import SHOWN
from finetune_assets.data.encoding import Contexts
from finetune_assets.data.errors import RefusedRow
from finetune_assets.data.layouts.instruction import conversation
from finetune_assets.data.raw_files import rows_at
from finetune_assets.data.rows import Row, Split
from finetune_assets.data.serving_template import prompt_messages, use_serving_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPARED_ROWS = 2_000
"""Rows to compare, evenly spaced over the training split."""
SHOWN_TOKENS = 4


@dataclass
class PromptBoundary:
    """Prompts whose tokens differ between training and serving.

    Attributes:
        compared: Number of rows compared.
        changed: Number of rows whose prompts differ.
        first: The first of them, by number in the raw data.
        difference: How the prompt of the first differs.
    """

    compared: int = 0
    changed: int = 0
    first: list[int] = field(default_factory=list)
    difference: str = ""


def prompt_boundary(
    train: Path,
    raw: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    data: Data,
    most: int = COMPARED_ROWS,
    contexts: Contexts | None = None,
) -> PromptBoundary:
    """Compare prompts of the training split with the prompts that a server renders with the adapter's chat template.

    Args:
        train: Arrow stream of the train split.
        raw: Parquet files of the raw data.
        tokenizer: The experiment's tokenizer; it is given the adapter's chat template.
        data: The experiment's data settings.
        most: Maximum number of rows to compare.
        contexts: Replaces the contexts of the rows, as in training.
    """
    table = pa.ipc.open_stream(pa.memory_map(str(train))).read_all().select(["row", "input_ids", "prompt_length"])
    examples = table.take(np.unique(np.linspace(0, len(table) - 1, min(most, len(table))).astype(np.int64)))
    numbers = examples["row"].to_pylist()
    render, cutoff = _renderer(use_serving_template(tokenizer, data), data), data.tokenization.cutoff_len
    found = PromptBoundary(compared=len(numbers))
    texts: list[str] = []
    problems: dict[int, str] = {}
    rows: list[Row | RefusedRow] = rows_at(raw, numbers)  # type: ignore[assignment]
    if contexts:
        rows = contexts(rows_at(raw, numbers), [Split.TRAIN] * len(numbers))
    for index, row in enumerate(rows):
        try:
            if isinstance(row, RefusedRow):
                raise row
            texts.append(render(row))
        except RefusedRow as e:
            texts.append("")
            problems[index] = f"the prompt alone is {e}"
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    trained = zip(examples["input_ids"].to_pylist(), examples["prompt_length"].to_pylist(), strict=True)
    for index, ((ids, length), encoding) in enumerate(zip(trained, encodings, strict=True)):
        served = encoding.ids[:cutoff]
        if served == ids[:length] and index not in problems:
            continue
        found.changed += 1
        if len(found.first) < SHOWN:
            found.first.append(numbers[index])
            found.difference = found.difference or problems.get(index) or _difference(ids[:length], served, tokenizer)
    return found


def _renderer(tokenizer: "PreTrainedTokenizerBase", data: Data) -> Callable[[Row], str]:
    """The function that renders the prompt of a row with the tokenizer's chat template."""
    if data.prompt_template.chat_template:
        chat = ChatTemplate(tokenizer)
        return lambda row: chat.prompt(
            row["messages"] or conversation(row["instruction"], row["context"], row["response"]), row.get("tools")
        )
    jinja = Jinja(tokenizer)
    return lambda row: jinja.render(prompt_messages(row), prompt=True)[0]


def _difference(trained: list[int], served: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """The first tokens that differ, as text."""
    same = next((i for i, pair in enumerate(zip(trained, served, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(trained), len(served)) if same is None else same
    sides = [[tokenizer.decode([i]) for i in ids[at : at + SHOWN_TOKENS]] for ids in (trained, served)]
    return f"from token {at} the prompt is {sides[0]} in training and {sides[1]} without an answer"
