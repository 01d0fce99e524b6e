"""Turns as OpenAI, ShareGPT, LLaMA-Factory, axolotl and ms-swift write them; what would lose something is a bad row."""

import json
from pathlib import Path
from typing import Any

import pytest
from raw import quarantined, rows_of

from finetune_assets.data.layouts.conversation import ignored_turn_keys
from finetune_assets.data.rows import Row

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": [1, None]}}}
DEFINED = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": DEFINED}
WITH_CALL = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def read(tmp_path: Path, *rows: Any) -> list[Row]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows_of(path, out=tmp_path)


def turn(tmp_path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """A turn as it comes out, after a user turn and before a further exchange."""
    ((row),) = read(tmp_path, {"messages": [ASKED, given, ASKED, SAID]})
    assert (row["messages"][0], row["messages"][2:]) == (ASKED, [ASKED, SAID])
    return row["messages"][1]


@pytest.mark.parametrize(
    "given",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL], "content": None},
        {"tool_calls": [CALL], "content": " \n"},
        {"tool_calls": [{**CALL, "index": 0}], "content": "", "refusal": None, "annotations": [], "audio": None},
        {"tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"b": 2, "a": [1, null]}'}}]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"name": "add", "arguments": {"b": 2, "a": [1, None]}}]},
        {"tool_calls": [{"name": "add", "parameters": {"b": 2, "a": [1, None]}}]},
        {"function_call": {"name": "add", "arguments": '{"b": 2, "a": [1, null]}'}, "content": None},
        {"role": "function_call", "content": '{"name": "add", "arguments": {"b": 2, "a": [1, null]}}'},
        {"role": "tool_call", "content": '[{"name": "add", "arguments": "{\\"b\\": 2, \\"a\\": [1, null]}"}]'},
    ],
)
def test_spellings_of_a_call(tmp_path: Path, given: dict[str, Any]) -> None:
    """The order of the arguments is kept: it is the order in which they are learned."""
    read_turn = turn(tmp_path, {"role": "assistant", **given})
    assert read_turn.keys() == {"role", "content", "tool_calls"}
    assert (read_turn["role"], read_turn["content"]) == ("assistant", "")
    assert read_turn["tool_calls"] == json.dumps([CALL])


def test_ids_content_and_further_calls_are_kept(tmp_path: Path) -> None:
    calls = [{**CALL, "id": "c1"}, {"type": "function", "function": {"name": "now", "arguments": {}}, "id": "c2"}]
    given = [{**calls[0]}, {**calls[1], "function": {"name": "now", "arguments": ""}}]
    read_turn = turn(tmp_path, {**SAID, "tool_calls": given})
    assert (read_turn["content"], json.loads(read_turn["tool_calls"])) == ("Hello", calls)


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython", "environment", "tool_response"])
def test_answers_of_tools(tmp_path: Path, role: str) -> None:
    given = {"role": role, "content": "3", "tool_call_id": "c1", "name": "add"}
    assert turn(tmp_path, given) == {**given, "role": "tool"}
    assert turn(tmp_path, {"from": role, "value": ""}) == {"role": "tool", "content": ""}


def test_llama_factorys_turns(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Three."},
    ]
    (row,) = read(tmp_path, {"conversations": turns, "system": "Add.", "tools": json.dumps([DEFINED])})
    assert [one["role"] for one in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert (row["instruction"], row["context"], row["response"]) == ("1 + 2?", "Add.", "Three.")
    assert json.loads(row["tools"]) == [TOOL]


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": [DEFINED]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"functions": [DEFINED]},
        {"functions": json.dumps([DEFINED])},
    ],
)
def test_spellings_of_tools(tmp_path: Path, columns: dict[str, Any]) -> None:
    """One question and its answer stay turns, so that the tools are rendered."""
    (row,) = read(tmp_path, {"messages": [ASKED, SAID], **columns})
    assert (json.loads(row["tools"]), row["messages"]) == ([TOOL], [ASKED, SAID])


def test_nulls_that_parquet_adds_to_definitions_are_left_out(tmp_path: Path) -> None:
    """Definitions of different tools have one type there, with every key in each."""
    city = {"type": "string", "enum": ["Kelm", None], "default": None}
    schema = {"type": "object", "properties": {"city": {**city, "items": None}, "unit": None}}
    function = {"name": "weather", "parameters": schema}
    (row,) = read(tmp_path, {"messages": [ASKED, SAID], "tools": [{"type": "function", "function": function}]})
    (kept,) = json.loads(row["tools"])
    assert kept["function"]["parameters"] == {"type": "object", "properties": {"city": city}}


@pytest.mark.parametrize("system", ["", "Add."])
def test_tools_of_a_row_of_instruction_and_response(tmp_path: Path, system: str) -> None:
    row = {"instruction": "Hi", "input": "It rains.", "output": "Hello", "tools": [DEFINED], "system": system}
    (read_row,) = read(tmp_path, row)
    first = [{"role": "system", "content": system}] if system else []
    assert read_row["messages"] == [*first, {"role": "user", "content": "Hi\n\nIt rains."}, SAID]
    assert json.loads(read_row["tools"]) == [TOOL]


@pytest.mark.parametrize("empty", [[], "", "[]", None])
def test_no_tools(tmp_path: Path, empty: Any) -> None:
    (row,) = read(tmp_path, {"messages": [ASKED, SAID], "tools": empty})
    assert "tools" not in row
    assert row["messages"] is None


def test_the_response_of_a_conversation_that_ends_in_a_call_is_the_call(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"messages": [ASKED, WITH_CALL]})
    assert (row["response"], row["messages"][1]["tool_calls"]) == (json.dumps([CALL]),) * 2


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss_scale", "loss_mask", "loss", "train", "training"])
@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), (0.0, 1.0)])
def test_weights(tmp_path: Path, key: str, off: Any, on: Any) -> None:
    assert turn(tmp_path, {**SAID, key: off}) == {**SAID, "weight": 0.0}
    assert turn(tmp_path, {**SAID, key: on}) == SAID
    assert turn(tmp_path, {**SAID, key: None}) == SAID
    (row,) = read(tmp_path, {"messages": [ASKED, {**SAID, key: on}]})
    assert row["messages"] is None
    (row,) = read(tmp_path, {"messages": [{**ASKED, key: off}, SAID, ASKED, {**SAID, "content": "No", key: off}]})
    assert (row["response"], row["messages"][0]) == ("Hello", ASKED)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_reasoning(tmp_path: Path, key: str) -> None:
    assert turn(tmp_path, {**SAID, key: "A greeting."}) == {**SAID, "reasoning_content": "A greeting."}
    assert turn(tmp_path, {**SAID, key: " "}) == SAID
    (row,) = read(tmp_path, {"messages": [ASKED, {**SAID, key: "A greeting."}]})
    assert row["messages"][1]["reasoning_content"] == "A greeting."


def test_names_are_kept(tmp_path: Path) -> None:
    assert turn(tmp_path, {**SAID, "name": "Bob"}) == {**SAID, "name": "Bob"}


def test_the_developers_turn_is_the_system_turn(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"messages": [{"role": "developer", "content": "Be brief."}, ASKED, SAID]})
    assert (row["context"], row["messages"][0]) == ("Be brief.", {"role": "system", "content": "Be brief."})


def test_text_parts_are_joined_in_order(tmp_path: Path) -> None:
    parts = [
        {"type": "text", "text": "Hel", "image_url": None},
        {"type": "text", "value": "l"},
        {"type": "output_text", "content": "o", "cache_control": {"type": "ephemeral"}},
    ]
    assert turn(tmp_path, {**SAID, "content": parts}) == SAID


def test_identifiers_are_passed_over_and_listed(tmp_path: Path) -> None:
    beside = {"id": "x", "message_id": 3, "timestamp": 1.5, "hashed_ip": "f", "turn_identifier": 0, "toxic": False}
    assert turn(tmp_path, {**SAID, **beside}) == SAID
    row = {"messages": [{**ASKED, "created_at": "now"}, {**SAID, **beside, "uuid": None}]}
    assert ignored_turn_keys(row) == sorted([*beside, "created_at"])
    assert ignored_turn_keys({"dialog": json.dumps(row["messages"])}, ("dialog",)) == sorted([*beside, "created_at"])
    for other in ({"instruction": "i"}, {"messages": "[oops"}, {"messages": 3}, {"messages": ["x"]}):
        assert ignored_turn_keys(other) == []


def call(**changed: Any) -> dict[str, Any]:
    return {**SAID, "tool_calls": [{**CALL, **changed}]}


BAD: list[tuple[dict[str, Any], list[str]]] = [
    (call(function={"name": "add", "arguments": "{oops"}), ["'add'", "JSON"]),
    (call(function={"name": "add", "arguments": '{"a": 1, "a": 2}'}), ["'add'", "'a'", "twice"]),
    (call(function={"name": "add", "arguments": '{"a": NaN}'}), ["'add'", "NaN"]),
    (call(function={"name": "add", "arguments": [1]}), ["'add'", "[1]"]),
    (call(function={"name": "", "arguments": {}}), ["name"]),
    (call(function={"name": "add", "arguments": {"a": 1}, "parameters": {"a": 2}}), ["'arguments'", "'parameters'"]),
    (call(type="custom"), ["custom"]),
    (call(id=7), ["id", "7"]),
    (call(thought_signature="x"), ["'thought_signature'", "x"]),
    ({**SAID, "tool_calls": "add(1)"}, ["'tool_calls'", "JSON"]),
    ({**SAID, "tool_calls": [3]}, ["'tool_calls'", "3"]),
    ({**SAID, "tool_calls": [CALL], "function_call": CALL["function"]}, ["'tool_calls'", "'function_call'"]),
    ({"role": "function_call", "content": "add(1)"}, ["function_call", "JSON"]),
    ({"role": "function_call", "content": " "}, ["function_call", "blank"]),
    ({**ASKED, "tool_calls": [CALL]}, ["'tool_calls'", "user"]),
    ({**SAID, "content": "", "tool_calls": []}, ["blank"]),
    ({**SAID, "content": "", "reasoning": "Hm."}, ["blank"]),
    ({**SAID, "content": None}, ["content", "null"]),
    ({**SAID, "weight": 0.5}, ["'weight'", "0.5"]),
    ({**SAID, "loss_scale": 2}, ["'loss_scale'", "2"]),
    ({**SAID, "weight": -1}, ["'weight'", "-1"]),
    ({**SAID, "train": "false"}, ["'train'", "false"]),
    ({**SAID, "weight": 1, "train": False}, ["weight", "train", "contradict"]),
    ({**SAID, "masking": True}, ["'masking'", "ambiguous"]),
    ({**SAID, "mask": 0}, ["'mask'", "ambiguous"]),
    ({**ASKED, "train": True}, ["'train'", "user"]),
    ({**SAID, "train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, ["'train_detail'"]),
    ({**SAID, "reasoning": "a", "thinking": "b"}, ["'reasoning'", "'thinking'"]),
    ({**SAID, "reasoning": {"text": "a"}}, ["'reasoning'", "text"]),
    ({**ASKED, "thought": "a"}, ["'thought'"]),
    ({**SAID, "reasoning_details": [{"text": "a"}]}, ["'reasoning_details'"]),
    ({**SAID, "image": "a.png"}, ["'image'", "images"]),
    ({**SAID, "images": ["a.png"]}, ["'images'"]),
    ({**SAID, "image_id": 3}, ["'image_id'"]),
    ({**SAID, "audio": {"id": 1}}, ["'audio'"]),
    ({**SAID, "videos": ["a.mp4"]}, ["'videos'"]),
    ({**SAID, "files": ["a.pdf"]}, ["'files'"]),
    ({**SAID, "emotion": "glad"}, ["'emotion'", "glad"]),
    ({**SAID, "refusal": "No."}, ["'refusal'", "No."]),
    ({**SAID, "name": 3}, ["'name'", "3"]),
    ({**SAID, "from": "human"}, ["'role'", "'from'"]),
    ({**SAID, "speaker": "Bob"}, ["'speaker'", "Bob"]),
    ({**SAID, "value": "Bye"}, ["'content'", "'value'"]),
    (
        {**SAID, "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]},
        ["part 2", "image_url"],
    ),
    ({**SAID, "content": [{"type": "input_audio", "input_audio": {}}]}, ["part 1", "input_audio"]),
    ({**SAID, "content": [{"type": "thinking", "thinking": "a"}]}, ["part 1", "thinking"]),
    ({**SAID, "content": [{"type": "text", "text": "a", "image": "x"}]}, ["part 1", "'image'"]),
    ({**SAID, "content": ["a", "b"]}, ["part 1", "a"]),
    ({**SAID, "content": [{"type": "text", "text": "a", "value": "b"}]}, ["part 1", "one text"]),
    ({**SAID, "content": []}, ["blank"]),
    ({**SAID, "content": {"answer": 3}}, ["content", "answer"]),
]


@pytest.mark.parametrize(("given", "facts"), BAD)
def test_turn_that_would_lose_something_is_a_bad_row(tmp_path: Path, given: dict[str, Any], facts: list[str]) -> None:
    good = {"messages": [ASKED, SAID]}
    assert len(read(tmp_path, good, {"messages": [ASKED, given, ASKED, SAID]}, good)) == 2
    (bad,) = quarantined(tmp_path)
    assert bad["line"] == 2
    for fact in ["turn 2", *facts]:
        assert fact in bad["reason"]


@pytest.mark.parametrize(
    ("messages", "facts"),
    [
        ("[]", ["'messages'"]),
        ("[" * 100_000, ["'messages'", "JSON"]),
        ('[{"role": "user", "content": "a", "content": "b"}]', ["'messages'", "'content'", "twice"]),
        ([ASKED, {**SAID, "weight": 0}], ["'weight'", "0"]),
        ([ASKED, SAID, {"role": "developer", "content": "x"}], ["turn 3", "system"]),
    ],
)
def test_turns_that_cannot_be_learned_from_are_a_bad_row(tmp_path: Path, messages: Any, facts: list[str]) -> None:
    assert read(tmp_path, {"messages": messages, "system": "s" * ("[]" in messages)}) == []
    (bad,) = quarantined(tmp_path)
    for fact in facts:
        assert fact in bad["reason"]


@pytest.mark.parametrize(
    ("tools", "facts"),
    [
        ("{oops", ["'tools'", "JSON"]),
        ([3], ["tool 1", "3"]),
        ([TOOL, {"type": "web_search"}], ["tool 2", "web_search"]),
        ([{"description": "Adds."}], ["tool 1", "name"]),
        ([{"type": "function", "function": "add"}], ["tool 1", "add"]),
        ({"add": DEFINED}, ["'tools'", "list"]),
        ("add, subtract", ["'tools'", "JSON"]),
    ],
)
def test_tools_that_are_no_definitions_are_a_bad_row(tmp_path: Path, tools: Any, facts: list[str]) -> None:
    assert read(tmp_path, {"messages": [ASKED, SAID], "tools": tools}) == []
    (bad,) = quarantined(tmp_path)
    for fact in facts:
        assert fact in bad["reason"]
