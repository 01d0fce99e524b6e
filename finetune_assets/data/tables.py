"""Markdown tables of rows and conversations, in which secrets and personal data are hidden."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from finetune_assets.data.rows import Row, Turn
from finetune_assets.data.sensitive import masked
from finetune_assets.display import markdown

MOST_SEARCHED = 100_000
"""Characters of a text that are searched for secrets."""


def rows_table(rows: list[dict[str, Any]], columns: Iterable[str]) -> str:
    """A Markdown table; long cells are shortened."""
    names = list(columns)
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(markdown(_short(str(row[name]))) for name in names)} |" for row in rows]
    return "\n".join(lines)


def conversations_table(rows: list[Row]) -> str:
    """A Markdown table with one conversation per line; long turns are shortened, and turns with weight 0 are marked."""
    lines = ["| category | turns |", "| --- | --- |"]
    for row in rows:
        parts = [f"tools: {_short(_tools(row['tools']))}"] if row.get("tools") else []
        parts += [line for turn in row["messages"] for line in _turn_lines(turn)]
        turns = "\n".join(parts)
        lines.append(f"| {markdown(row['category'])} | {markdown(turns)} |")
    return "\n".join(lines)


def _tools(tools: str) -> str:
    return ", ".join(tool["function"]["name"] for tool in json.loads(tools))


def _turn_lines(turn: Turn) -> Iterator[str]:
    name = f" ({turn['name']})" if turn.get("name") else ""
    speaker = f"{turn['role']}{name}{', not learned' if turn.get('weight') == 0 else ''}"
    if turn.get("reasoning_content"):
        yield f"{speaker}, reasoning: {_short(turn['reasoning_content'])}"
    if turn["content"] or not turn.get("tool_calls"):
        yield f"{speaker}: {_short(turn['content'])}"
    for call in json.loads(turn.get("tool_calls") or "[]"):
        function = call["function"]
        arguments = _short(json.dumps(function["arguments"], ensure_ascii=False))
        yield f"{speaker}, call: {function['name']}({arguments})"


def _short(text: str, longest: int = 160) -> str:
    # First, and in more than is shown: of a key that is cut off, too little may be left to recognise it
    text = masked(text[:MOST_SEARCHED])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
