"""Previews show rows as they are, whatever Markdown or HTML they hold."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from planted import PLANTED

from finetune_assets.data.encoding import EXAMPLE_SCHEMA
from finetune_assets.data.preview import masked_tokens
from finetune_assets.data.tables import conversations_table, rows_table
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.sources.base_models import PACKAGED


def test_cells_keep_their_text_in_their_cell() -> None:
    table = rows_table([{"a": "x|y\r\nz", "b": "<img src=x> & so"}, {"a": "w" * 500, "b": 3}], ["a", "b"])
    lines = table.split("\n")
    assert lines[2] == "| x\\|y<br>z | &lt;img src=x> &amp; so |"
    assert lines[3] == f"| {'w' * 159}… | 3 |"


def test_every_turn_of_a_conversation_is_shown() -> None:
    turns = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c" * 500}]
    table = conversations_table([{"category": "chat", "messages": turns}])
    assert table.split("\n")[2] == f"| chat | user: a<br>b<br>assistant: {'c' * 159}… |"


def test_tools_calls_reasoning_and_weights_of_a_conversation_are_shown() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "é|"}}}
    turns = [
        {"role": "user", "content": "a", "name": "Ann", "weight": None},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([call, call]), "reasoning_content": "Hm."},
        {"role": "tool", "content": "", "name": "add"},
        {"role": "assistant", "content": "c", "weight": 0.0},
        {"role": "assistant", "content": "d"},
    ]
    row = {"category": "", "messages": turns, "tools": json.dumps([{"type": "function", "function": {"name": "add"}}])}
    assert conversations_table([row]).split("\n")[2] == (
        '|  | tools: add<br>user (Ann): a<br>assistant, reasoning: Hm.<br>assistant, call: add({"a": "é\\|"})<br>'
        'assistant, call: add({"a": "é\\|"})<br>tool (add): <br>assistant, not learned: c<br>assistant: d |'
    )


def test_masked_and_learned_tokens_stand_apart(tmp_path: Path) -> None:
    """Also where text holds fences or other line ends, which must not end the block."""
    shown = shown_tokens(tmp_path, "```\rWhy?", "So.\n```")
    assert shown == "```diff\n- ```\n- Why?\n+ So.\n+ ```\n- ```\n- Why?\n```"


def shown_tokens(folder: Path, prompt: str, response: str) -> str:
    """The preview of an example in which the response is learned, and the prompt before and after it is not."""
    tokenizer = load_tokenizer(str(PACKAGED["demo-base"]))
    asked, said = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, response))
    row = {
        "input_ids": [*asked, *said, *asked],
        "labels": [*[-100] * len(asked), *said, *[-100] * len(asked)],
        "prompt_length": len(asked),
        "row": 0,
        "category": "",
    }
    with pa.ipc.new_stream(str(folder / "train.arrow"), EXAMPLE_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist([row], schema=EXAMPLE_SCHEMA))
    return masked_tokens(folder / "train.arrow", tokenizer)


@pytest.mark.parametrize("at", [0, 560, 590])
@pytest.mark.parametrize("kind", ["GitHub token", "e-mail address", "payment card", "assigned secret"])
def test_secrets_are_hidden_in_previews_of_tokens(kind: str, at: int, tmp_path: Path) -> None:
    """Also those that the preview would cut in two."""
    _, text, secret = next(planted for planted in PLANTED if planted[0] == kind)
    shown = shown_tokens(tmp_path, "Why " * (at // 4) + text, f"It is {text}")
    assert not any(secret[start : start + 8] in shown for start in range(len(secret) - 7))
    assert "+ It is " in shown
