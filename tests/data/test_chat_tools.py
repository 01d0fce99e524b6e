"""Conversations with tools, reasoning and weights: exactly what the assistant says and is to learn is learned."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.chats import CHATML
from data.test_chat import by_spans, chat_data, tokenizer_of
from data.tool_chats import DEEPSEEK, LLAMA3, QWEN3, QWEN25, TOOL_FAMILIES, TOOL_TOKENS
from data.tool_conversations import Generator, tool, up_to_the_last_learned
from raw import ingest
from transformers import PreTrainedTokenizerBase

from finetune_assets.data.chat import ChatTemplate, Rendered
from finetune_assets.data.errors import RefusedRow
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.raw_schema import RAW_SCHEMA
from finetune_assets.data.rows import Row, Turn
from finetune_assets.data.tokenization import IGNORED, Encoder, load_tokenizer
from finetune_assets.sources.base_models import PACKAGED

COUNT = 500 if os.environ.get("SOAK") else 60
ASKED, SAID = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "It rains."}
CALLS = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Öl"}}, "id": "123456789"}]
CALLED = {"role": "assistant", "content": "", "tool_calls": json.dumps(CALLS)}
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "123456789", "name": "get_weather"}
TOOLS = json.dumps([tool("get_weather")])


def template_of(template: str) -> ChatTemplate:
    return ChatTemplate(tokenizer_with(template))


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(PACKAGED["demo-base"]), TOOL_TOKENS)
    tokenizer.chat_template = template
    return tokenizer


def row(turns: list[Turn], tools: Any = None) -> Row:
    text = json.dumps(tools) if tools else None
    return {"instruction": "", "context": "", "response": "", "category": "", "messages": turns, "tools": text}


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.mark.parametrize("kind", ["special tokens", "plain text", "trimmed offsets"])
@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_conversations_equal_the_slow_reference(family: str, kind: str) -> None:
    """Seeded conversations; 500 of each family under SOAK=1."""
    tokenizer = tokenizer_of(kind)
    if kind != "plain text":
        tokenizer.add_special_tokens({"extra_special_tokens": TOOL_TOKENS}, replace_extra_special_tokens=False)
    tokenizer.chat_template = TOOL_FAMILIES[family].template
    generator = Generator(TOOL_FAMILIES[family], seed=len(family))
    made = [generator.conversation() for _ in range(COUNT)]
    examples = Encoder(tokenizer, chat_data()).encode([row(*one) for one in made])
    assert examples.refused == []
    ends, tokens = np.cumsum(examples.lengths), 0
    for (turns, tools), end, length, prompt in zip(made, ends, examples.lengths, examples.prompt_lengths, strict=True):
        written = TOOL_FAMILIES[family].by_hand(up_to_the_last_learned(turns), tools)
        ids, labels = by_spans(tokenizer, written.text, written.spans)
        assert examples.input_ids[end - length : end].tolist() == ids, turns
        assert examples.labels[end - length : end].tolist() == labels, turns
        assert prompt == by_spans(tokenizer, written.text, written.spans[-1:])[1].index(ids[prompt])
        tokens += sum(label != IGNORED for label in labels)
    assert tokens > 5 * COUNT


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_the_families_tools_calls_weights_and_reasoning_occur(family: str) -> None:
    features = TOOL_FAMILIES[family]
    generator = Generator(features, seed=len(family))
    made = [generator.conversation() for _ in range(COUNT)]
    turns = [turn for one, _ in made for turn in one]
    assert any(turn.get("weight") == 0 for turn in turns)
    assert any(tools for _, tools in made) == features.defines
    assert any("tool_calls" in turn for turn in turns) == bool(features.calls)
    assert any("reasoning_content" in turn for turn in turns) == features.reasons


def test_the_call_is_learned_and_the_answer_of_the_tool_is_not() -> None:
    rendered = template_of(QWEN25).render([ASKED, CALLED, RESULT, SAID], TOOLS)
    assert learned(rendered) == [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Öl"}}\n</tool_call><|im_end|>\n',
        "It rains.<|im_end|>\n",
    ]
    assert '"description": "Does get_weather."' in rendered.text
    assert "rain\n</tool_response>" in rendered.text


def test_arguments_are_text_where_the_template_joins_them_to_text() -> None:
    rendered = template_of(DEEPSEEK).render([ASKED, CALLED, RESULT, SAID])
    assert '```json\n{"city": "Öl"}\n```' in learned(rendered)[0]


UNQUOTED = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments }}){% endfor %}",
)


def test_arguments_are_text_where_the_template_would_write_them_in_pythons_notation() -> None:
    assert learned(template_of(UNQUOTED).render([ASKED, CALLED])) == ['get_weather({"city": "Öl"})<|im_end|>\n']


REPR = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ c.function }}{% endfor %}")
REPR_AND_NAME = REPR.replace("{{ c.function }}", "{{ c.function.name }}{{ c.function }}")
FIRST_ONLY = QWEN25.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
NO_ARGUMENTS = QWEN25.replace("{{ c.function.arguments | tojson }}", "{}")
NAMES_ONLY = QWEN25.replace("(t | tojson)", "t.function.name")
NO_BLANKS = (
    "{% for m in messages %}{% if m.content == '' %}{{ raise_exception('no blanks') }}{% endif %}{% endfor %}" + QWEN25
)
NO_RESULTS = QWEN25.replace("{{ m.content }}\n</tool_response>", "</tool_response>")
NO_REASONING = QWEN3.replace("{{ thought.strip('\\n') }}", "")
TWO_CALLS = {**CALLED, "tool_calls": json.dumps([*CALLS, {**CALLS[0], "function": {"name": "add", "arguments": {}}}])}
THOUGHT = {**SAID, "reasoning_content": "Clouds."}


@pytest.mark.parametrize(
    ("template", "turns", "tools", "facts"),
    [
        (CHATML, [ASKED, CALLED], None, ["tool calls", "turn 2"]),
        (REPR, [ASKED, CALLED], None, ["tool calls", "turn 2"]),
        (REPR_AND_NAME, [ASKED, CALLED], None, ["arguments", "turn 2", "Python"]),
        (FIRST_ONLY, [ASKED, TWO_CALLS], None, ["tool calls", "turn 2"]),
        (NO_ARGUMENTS, [ASKED, CALLED], None, ["arguments", "turn 2"]),
        (CHATML, [ASKED, SAID], TOOLS, ["'tools'"]),
        (NAMES_ONLY, [ASKED, SAID], TOOLS, ["'tools'"]),
        (NO_RESULTS, [ASKED, CALLED, RESULT, SAID], TOOLS, ["content of turn 3", "tool"]),
        (NO_REASONING, [ASKED, THOUGHT], None, ["reasoning of turn 2"]),
        (CHATML, [ASKED, THOUGHT], None, ["reasoning of turn 2"]),
        (LLAMA3, [ASKED, TWO_CALLS], None, ["one call only"]),
        (DEEPSEEK, [ASKED, CALLED, RESULT, SAID], TOOLS, ["'tools'"]),
        (NO_BLANKS, [ASKED, CALLED], None, ["no blanks"]),
        (
            TOOL_FAMILIES["Mistral"].template,
            [ASKED, {**CALLED, "tool_calls": json.dumps([{**CALLS[0], "id": "1"}])}],
            None,
            ["9"],
        ),
        (TOOL_FAMILIES["Gemma"].template, [ASKED, CALLED, RESULT, SAID], None, ["tool"]),
    ],
)
def test_what_a_template_omits_is_refused(
    template: str, turns: list[Turn], tools: str | None, facts: list[str]
) -> None:
    with pytest.raises(RefusedRow) as refused:
        template_of(template).render(turns, tools)
    for fact in facts:
        assert fact in str(refused.value)


def test_reasoning_of_earlier_turns_may_be_left_out_and_is_counted() -> None:
    turns = [ASKED, {**THOUGHT, "content": "No."}, ASKED, THOUGHT]
    rendered = template_of(QWEN3).render(turns)
    assert learned(rendered) == ["No.<|im_end|>\n", "<think>\nClouds.\n</think>\n\nIt rains.<|im_end|>\n"]
    assert rendered.omitted == ("reasoning of earlier turns",)
    examples = Encoder(tokenizer_with(QWEN3), chat_data()).encode([row(turns), row([ASKED, SAID]), row(turns)])
    assert examples.omitted == {"reasoning of earlier turns": 2}


@pytest.mark.parametrize("strip", [False, True])
def test_reasoning_inside_the_content_is_learned_or_refused(strip: bool) -> None:
    """DeepSeek's structure removes it from every turn, the last one included."""
    template = template_of(DEEPSEEK if strip else CHATML)
    turns = [ASKED, {**SAID, "content": "<think>Clouds.</think>It rains."}]
    if strip:
        with pytest.raises(RefusedRow, match="It rains"):
            template.render(turns)
    else:
        assert learned(template.render(turns)) == ["<think>Clouds.</think>It rains.<|im_end|>\n"]


def test_names_are_rendered_where_the_template_takes_them() -> None:
    turns = [{**ASKED, "name": "Ann"}, SAID]
    assert template_of(CHATML).render(turns).omitted == ("name of a turn with role user",)
    named = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ ' name=' + m.name if m.name }}")
    rendered = template_of(named).render([*turns, ASKED, {**SAID, "name": "Bob"}])
    assert rendered.omitted == ()
    assert rendered.text.startswith("<|im_start|>user name=Ann\nWeather?")
    assert learned(rendered) == ["It rains.<|im_end|>\n"] * 2


MASKED = {**SAID, "content": "Wrong.", "weight": 0.0}


@pytest.mark.parametrize("template", [CHATML, TOOL_FAMILIES["SmolLM"].template])
def test_turns_with_weight_0_are_context_only(template: str) -> None:
    rendered = template_of(template).render([ASKED, MASKED, ASKED, SAID, ASKED, MASKED])
    assert learned(rendered) == ["It rains.<|im_end|>\n"]
    assert rendered.text.count("Wrong.") == 1, "what follows the last learned turn is left out"
    assert [rendered.text[start:end] for start, end in rendered.masked] == ["Wrong.<|im_end|>\n"]


def test_turns_with_weight_0_stay_masked_where_inputs_are_learned() -> None:
    tokenizer = tokenizer_with(CHATML)
    examples = Encoder(tokenizer, chat_data(train_on_inputs=True)).encode([row([ASKED, MASKED, ASKED, SAID])])
    masked = examples.input_ids[examples.labels == IGNORED]
    assert tokenizer.decode(masked) == "Wrong.<|im_end|>\n"


def test_a_mark_that_only_begins_like_the_next_one_is_not_learned() -> None:
    """After the last turn this structure writes a further mark, which begins like the user's."""
    template = template_of(TOOL_FAMILIES["Phi"].template)
    assert learned(template.render([ASKED, SAID, ASKED, SAID])) == ["It rains.<|end|>", "It rains.<|end|></s>"]


RETURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
NO_END = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "ends"), [(RETURNS, ["<|end|>", "<|end|>", "<|return|>"]), (NO_END, ["", "", "</s>"])]
)
def test_turns_that_end_differently_than_the_last(template: str, ends: list[str]) -> None:
    """As in gpt-oss; and the header of the user's turn is never an end mark."""
    rendered = template_of(template).render([ASKED, SAID] * 3)
    assert learned(rendered) == ["It rains." + end for end in ends]


def test_older_rows_without_the_new_keys_are_rendered() -> None:
    turns = [{**turn, **dict.fromkeys(("reasoning_content", "tool_calls", "name", "weight"))} for turn in (ASKED, SAID)]
    template = template_of("{% for m in messages %}{{ m.keys() | list }}{{ m.content }}{% endfor %}")
    assert template.render(turns).text == "['role', 'content']Weather?['role', 'content']It rains."
    old = {key: value for key, value in row([ASKED, SAID]).items() if key != "tools"}
    assert len(Encoder(tokenizer_with(CHATML), chat_data()).encode([old]).rows) == 1


def test_rows_of_an_older_parquet_file_give_the_same_dataset(tmp_path: Path) -> None:
    """Its turns have role and content only, and its rows no tools."""
    turn = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
    fields = [field for field in RAW_SCHEMA if field.name not in ("messages", "tools")]
    older = pa.schema([*fields, pa.field("messages", pa.list_(turn))])
    text = {"instruction": "Weather?", "context": "", "response": "It rains.", "category": ""}
    rows = [
        {**text, "instruction": f"{i}?", "messages": [ASKED, SAID, ASKED, SAID] if i % 2 else None} for i in range(60)
    ]
    written = []
    for name, schema in (("older", older), ("newer", RAW_SCHEMA)):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / f"{name}.parquet")
        statistics = prepare_dataset(
            tmp_path / f"{name}.parquet", tokenizer_with(CHATML), chat_data(cutoff=512), "salt", tmp_path / name
        )
        assert (statistics.rows_read, statistics.refused) == (60, 0)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]


def test_tools_weights_and_parts_that_are_left_out_reach_the_dataset(tmp_path: Path) -> None:
    turns = [{**ASKED, "name": "Ann"}, CALLED, RESULT, {**SAID, "weight": 0.0}, ASKED, SAID]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": turns, "tools": TOOLS, "category": f"{i}"}) + "\n" for i in range(40))
    )
    rows = ingest(tmp_path / "raw", path)
    tokenizer, data = tokenizer_with(QWEN25), chat_data(cutoff=512)
    data.val_fraction = data.gate_fraction = 0.0
    statistics = prepare_dataset(rows, tokenizer, data, "salt", tmp_path)
    assert statistics.omitted == {"name of a turn with role user": 40, "name of a turn with role tool": 40}
    with pa.ipc.open_stream(str(tmp_path / "train.arrow")) as reader:
        first = reader.read_all().slice(0, 1).to_pylist()[0]
    assert "Does get_weather." in tokenizer.decode(first["input_ids"])
    said = tokenizer.decode([label for label in first["labels"] if label != IGNORED])
    assert (said.count("It rains."), said.count('"name": "get_weather"'), said.count("rain\n")) == (1, 1, 0)
