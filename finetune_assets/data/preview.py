"""Rows and examples as a person wants to look at them, in Markdown."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from finetune_assets.data.rows import Row
from finetune_assets.data.tokenization import IGNORED

SHOWN_CHARACTERS = 600
LINE_END = re.compile(r"\r\n|\r|\n")


def rows_table(rows: list[dict[str, Any]], columns: Iterable[str]) -> str:
    """A Markdown table; long cells are shortened."""
    names = list(columns)
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(_cell(_short(str(row[name]))) for name in names)} |" for row in rows]
    return "\n".join(lines)


def conversations_table(rows: list[Row]) -> str:
    """A Markdown table, a conversation a line, each of its turns shortened."""
    lines = ["| category | turns |", "| --- | --- |"]
    for row in rows:
        turns = "\n".join(f"{turn['role']}: {_short(turn['content'])}" for turn in row["messages"])
        lines.append(f"| {_cell(row['category'])} | {_cell(turns)} |")
    return "\n".join(lines)


def _short(text: str, longest: int = 160) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _cell(text: str) -> str:
    """Text that stays in its cell and is shown as it is, be it Markdown or HTML."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return LINE_END.sub("<br>", plain)


def masked_tokens(stream: Path, tokenizer: PreTrainedTokenizerBase, count: int = 3) -> str:
    """The first examples as the model sees them: what is masked after `-`, what is learned after `+`."""
    with pa.ipc.open_stream(pa.memory_map(str(stream))) as reader:
        rows = reader.read_all().slice(0, count).select(["input_ids", "labels"]).to_pylist()
    return "\n".join(f"```diff\n{_segments(row, tokenizer)}\n```" for row in rows)


def _segments(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    segments: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        learned = label != IGNORED
        if not segments or segments[-1][0] != learned:
            segments.append((learned, []))
        segments[-1][1].append(token)
    return "\n".join(_marked("+" if learned else "-", tokenizer.decode(ids)) for learned, ids in segments)


def _marked(mark: str, text: str) -> str:
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
    return "\n".join(f"{mark} {line}" for line in LINE_END.split(shown))
