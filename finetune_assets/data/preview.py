"""Previews of tokenized examples in Markdown, in which secrets and personal data are hidden."""

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from finetune_assets.data.sensitive import masked
from finetune_assets.data.tokenization import IGNORED
from finetune_assets.display import LINE_END, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARACTERS = 600


def masked_tokens(stream: Path, tokenizer: "PreTrainedTokenizerBase", count: int = 3) -> str:
    """The first examples as diff blocks: masked text after `-`, learned text after `+`."""
    with pa.ipc.open_stream(pa.memory_map(str(stream))) as reader:
        rows = reader.read_all().slice(0, count).select(["input_ids", "labels"]).to_pylist()
    return "\n".join(f"```diff\n{_segments(row, tokenizer)}\n```" for row in rows)


def _segments(row: dict[str, list[int]], tokenizer: "PreTrainedTokenizerBase") -> str:
    segments: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        learned = label != IGNORED
        if not segments or segments[-1][0] != learned:
            segments.append((learned, []))
        segments[-1][1].append(token)
    return "\n".join(_marked("+" if learned else "-", tokenizer.decode(ids)) for learned, ids in segments)


def _marked(mark: str, text: str) -> str:
    text = masked(text)
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
    return "\n".join(f"{mark} {plain(line)}" for line in LINE_END.split(shown))
