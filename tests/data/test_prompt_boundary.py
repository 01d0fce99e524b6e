"""Prompts whose tokens are others once an answer follows are counted, by comparing with what was prepared."""

import json
from pathlib import Path
from typing import Any

import pytest
from data.chats import CHATML, FAMILIES
from data.test_serving_template import FORMS, data_of
from data.tool_chats import TOOL_FAMILIES
from raw import ingest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_assets.config.schema import Data, PromptTemplate, Tokenization
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.prompt_boundary import PromptBoundary, prompt_boundary
from finetune_assets.sources.base_models import PACKAGED

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes an empty reasoning before an answer, but not into the generation prompt."""


def tokenizer_of(chat_template: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    tokenizer.chat_template = chat_template
    return tokenizer


def compared(
    folder: Path, rows: list[dict[str, Any]], data: Data, chat_template: str | None = None, most: int = 2_000
) -> PromptBoundary:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    raw = ingest(folder / "raw", folder / "rows.jsonl")
    data.val_fraction = data.gate_fraction = 0.0
    data.near_duplicate_threshold = None
    prepare_dataset(raw, tokenizer_of(chat_template), data, "salt", folder)
    return prompt_boundary(folder / "train.arrow", [raw], tokenizer_of(chat_template), data, most)


def asked(*answers: str) -> list[dict[str, Any]]:
    return [{"instruction": f"What is {i}?", "response": answer} for i, answer in enumerate(answers)]


def chat(cutoff_len: int = 512) -> Data:
    return Data(prompt_template=PromptTemplate(chat_template=True), tokenization=Tokenization(cutoff_len=cutoff_len))


def test_rows_whose_answer_takes_a_part_of_the_prompt_are_counted(tmp_path: Path) -> None:
    """The space before the answer is a part of its first token, unless the tokenizer has none for a space and a `z`."""
    found = compared(tmp_path, asked("It", "z", "A", "z", "The"), data_of(*FORMS["demo"]))
    assert (found.compared, found.changed, found.first) == (5, 2, [1, 3])
    assert found.difference.endswith("the prompt is [' '] in training and [] without an answer")


def test_the_rows_compared_are_spread_over_the_dataset(tmp_path: Path) -> None:
    rows = asked(*["The"] * 50, *["z"] * 50)
    found = compared(tmp_path, rows, data_of(*FORMS["demo"]), most=10)
    assert (found.compared, found.changed) == (10, 5)
    assert found.first[0] == 55
    assert len(found.first) == 5


def test_a_prompt_that_is_cut_off_is_the_same_as_far_as_it_goes(tmp_path: Path) -> None:
    data = Data(tokenization=Tokenization(cutoff_len=60, train_on_inputs=True))
    found = compared(tmp_path, [{"instruction": "word " * 100, "response": "Yes"}, *asked("Yes")], data)
    assert (found.compared, found.changed) == (2, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_chat_templates_are_those_of_whole_conversations(tmp_path: Path, family: str) -> None:
    turns = [{"role": role, "content": f"The {role} {i}"} for i in range(2) for role in ("user", "assistant")]
    rows = [{"messages": turns}, {"messages": [*turns[:3], {**turns[3], "weight": 0}]}, *asked("The")]
    found = compared(tmp_path, rows, chat(), FAMILIES[family].template)
    assert (found.compared, found.changed) == (3, 0), found.difference


def test_a_generation_prompt_that_answers_never_follow_is_counted(tmp_path: Path) -> None:
    assert compared(tmp_path, asked("Yes", "No"), chat(), CHATML).changed == 0
    found = compared(tmp_path, asked("Yes", "No"), chat(), THINKS)
    assert (found.compared, found.changed, found.first) == (2, 2, [0, 1])
    assert "think" in found.difference or "'<'" in found.difference


CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}
CALLED = [
    {"role": "user", "content": "Add"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "2"},
    {"role": "assistant", "content": "The result is 2"},
]


@pytest.mark.parametrize(("family", "changed"), [("Qwen 2.5", []), ("Mistral", []), ("Llama 3", []), ("Qwen 3", [1])])
def test_prompts_with_tools_and_calls(tmp_path: Path, family: str, changed: list[int]) -> None:
    """Where a call is learned, and where an answer after one is. Qwen 3 writes an empty thought before an answer, which
    is not in its generation prompt."""
    rows = [{"messages": CALLED[:2], "tools": [TOOL]}, {"messages": CALLED, "tools": [TOOL]}]
    found = compared(tmp_path, rows, chat(4096), TOOL_FAMILIES[family].template)
    assert (found.compared, found.first) == (2, changed), found.difference


def test_a_template_that_refuses_the_prompt_alone_is_counted(tmp_path: Path) -> None:
    needs_answer = (
        "{% if messages[-1].role != 'assistant' and messages | length > 1 %}{{ raise_exception('unanswered') }}"
        "{% endif %}" + CHATML
    )
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    found = compared(tmp_path, [{"messages": turns}], chat(), needs_answer)
    assert (found.changed, found.first) == (1, [0])
    assert "unanswered" in found.difference
