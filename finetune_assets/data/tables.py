"""Markdown tables of rows and conversations, in which secrets and personal data are hidden."""

import re
from collections.abc import Iterable
from typing import Any

from finetune_assets.data.rows import Row
from finetune_assets.data.sensitive import masked

LINE_END = re.compile(r"\r\n|\r|\n")


def rows_table(rows: list[dict[str, Any]], columns: Iterable[str]) -> str:
    """A Markdown table; long cells are shortened."""
    names = list(columns)
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(cell(_short(str(row[name]))) for name in names)} |" for row in rows]
    return "\n".join(lines)


def conversations_table(rows: list[Row]) -> str:
    """A Markdown table with one conversation per line; long turns are shortened."""
    lines = ["| category | turns |", "| --- | --- |"]
    for row in rows:
        turns = "\n".join(f"{turn['role']}: {_short(turn['content'])}" for turn in row["messages"])
        lines.append(f"| {cell(row['category'])} | {cell(turns)} |")
    return "\n".join(lines)


def _short(text: str, longest: int = 160) -> str:
    text = masked(text)  # first: of a key that is cut off, too little may be left to recognise it
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def cell(text: str) -> str:
    """Escape text for a table cell, so that Markdown and HTML in it are shown literally."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return LINE_END.sub("<br>", plain)
