"""Rows that look right and would lose something without a word: each is read whole, or set aside with its reason."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.test_chat_tools import tokenizer_with
from raw import ingest, quarantined, rows_of

from finetune_assets.data.chat import ChatTemplate
from finetune_assets.data.errors import RefusedRow

ASKED, SAID = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
PLAIN = {"instruction": "Q", "response": "A"}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read(tmp_path: Path, *rows: Any) -> list[dict[str, Any]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return rows_of(file, out=tmp_path)


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        (
            {
                "messages": [{"role": "user", "content": "2+12?"}, {"role": "assistant", "content": "14"}],
                "response": "4",
            },
            ["'response'"],
        ),
        ({"messages": [{"role": "user", "content": "bananas"}, SAID], "context": "an"}, ["'context'"]),
        ({"messages": [{"role": "user", "content": "bananas"}, SAID], "instruction": "a"}, ["'instruction'"]),
        ({"instruction": "A?", "question": "A?", "prompt": "B?", "response": "x"}, ["'instruction'", "'prompt'"]),
        ({**PLAIN, "system": "S", "system_prompt": "S", "system_message": "D"}, ["'system'", "'system_message'"]),
        (
            {
                "messages": [{"role": None, "from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
                "response": "B",
            },
            ["'response'"],
        ),
        (
            {"messages": [ASKED, {**SAID, "tool_calls": [{"function": {"name": "f"}, "arguments": {"a": 1}}]}]},
            ["'arguments'"],
        ),
        ({"messages": [ASKED, {**SAID, "tool_calls": [{"name": "g", "function": {"name": "f"}}]}]}, ["'name'"]),
        (
            {"prompt": "[{'role': 'user', 'content': 'Q'}]", "completion": "[{'role': 'assistant', 'content': 'A'}]"},
            ["JSON"],
        ),
        ({"prompt": json.dumps([ASKED]), "completion": "A"}, ["'prompt'", "'completion'"]),
        ({**PLAIN, "weight": 0}, ["'weight'", "columns.ignore"]),
        ({"messages": [ASKED, SAID], "train": False}, ["'train'", "columns.ignore"]),
        ({**PLAIN, "history": "[" * 3_000}, ["'history'"]),
    ],
)
def test_a_value_that_would_be_lost_makes_a_bad_row(tmp_path: Path, row: dict[str, Any], facts: list[str]) -> None:
    assert read(tmp_path, row) == []
    (bad,) = quarantined(tmp_path)
    for fact in facts:
        assert fact in bad["reason"]


@pytest.mark.parametrize("role", ["model", "bot", "gpt", "assistant"])
def test_earlier_answers_of_a_prompt_are_not_learned(tmp_path: Path, role: str) -> None:
    old, new = ({"role": role, "content": content} for content in ("OLD", "NEW"))
    (row,) = read(tmp_path, {"prompt": [ASKED, old, ASKED], "completion": [new]})
    assert [turn.get("weight") for turn in row["messages"]] == [None, 0, None, None]


def test_a_response_after_a_prompters_turn_is_its_answer(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"messages": [{"role": "prompter", "content": "Q"}], "response": "A"})
    assert (row["instruction"], row["response"]) == ("Q", "A")


def test_parquet_adds_no_arguments_to_calls(tmp_path: Path) -> None:
    turns = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call("weather", city="Paris")]}, ASKED]
    turns += [{"role": "assistant", "content": "", "tool_calls": [call("time", zone="CET")]}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "rows.parquet")
    (row,) = pq.read_table(ingest(tmp_path / "raw", tmp_path / "rows.parquet")).to_pylist()
    calls = [json.loads(turn["tool_calls"])[0]["function"] for turn in row["messages"] if turn["tool_calls"]]
    assert [one["arguments"] for one in calls] == [{"city": "Paris"}, {"zone": "CET"}]


MARKED = "{{% for m in messages %}}<|{{{{ m.role }}}}|>{}<|end|>{{% endfor %}}"
LEARNED = "{% generation %}{{ m.content }}{% endgeneration %}"


@pytest.mark.parametrize(
    "written",
    [
        "{% if m.role != 'system' %}{% if m.role == 'assistant' %}"
        + LEARNED
        + "{% else %}{{ m.content }}{% endif %}{% endif %}",
        "{% if m.role == 'assistant' %}{% if loop.last %}"
        + LEARNED
        + "{% else %}{{ m.content }}{% endif %}{% else %}{{ m.content }}{% endif %}",
    ],
    ids=["system turn omitted", "earlier answers not marked"],
)
def test_a_template_with_generation_marks_is_checked_too(written: str) -> None:
    tokenizer = tokenizer_with(MARKED.format(written))
    turns = [
        {"role": "system", "content": "be brief"},
        ASKED | {"content": "one"},
        SAID,
        ASKED | {"content": "two"},
        SAID,
    ]
    with pytest.raises(RefusedRow):
        ChatTemplate(tokenizer).render(turns)


def test_an_answer_of_a_tool_may_be_written_as_json() -> None:
    tokenizer = tokenizer_with(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'tool' %}{{ m.content | tojson }}"
        "{% elif m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}"
        "{% endif %}<|end|>{% endfor %}"
    )
    calls = json.dumps([call("f", a=1)])
    turns = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": '{"t": 2}\n'},
        SAID,
    ]
    rendered = ChatTemplate(tokenizer).render(turns)
    assert [rendered.text[start:end] for start, end in rendered.spans][-1] == "A<|end|>"
