"""The prepared dataset: what is in it, what is not, and that every row is accounted for."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from raw import ingest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_assets.config.schema import Data, PromptTemplate, Tokenization
from finetune_assets.data.errors import DataError
from finetune_assets.data.prepare import Statistics, prepare_dataset
from finetune_assets.data.preview import masked_tokens
from finetune_assets.data.rows import Split
from finetune_assets.data.tokenization import IGNORED
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE

SHORT = PromptTemplate(
    prompt_input="{context} {instruction} R:", prompt_no_input="{instruction} R:", response_split="R:"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PACKAGED["demo-base"])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ingest(tmp_path_factory.mktemp("raw"), SAMPLE)


def prepared(
    rows: Path, tokenizer: PreTrainedTokenizerBase, data: Data, out: Path
) -> tuple[Statistics, dict[str, list[dict[str, object]]]]:
    out.mkdir(exist_ok=True)
    statistics = prepare_dataset(rows, tokenizer, data, "salt", out)
    return statistics, {split: read(out / f"{split}.arrow") for split in Split}


def read(path: Path) -> list[dict[str, object]]:
    return pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist()


def test_every_row_is_accounted_for(rows: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = Data(
        categories=["open_qa", "closed_qa"],
        num_samples=500,
        prompt_template=SHORT,
        tokenization=Tokenization(cutoff_len=24),
    )
    statistics, splits = prepared(rows, tokenizer, data, tmp_path)
    kept = sum(len(examples) for examples in splits.values())
    assert statistics.rows_read == 800
    assert statistics.rows_of_other_categories == 80
    assert statistics.rows_beyond_num_samples == 220
    assert kept + statistics.without_label == 500
    assert statistics.without_label > 0
    assert {split: len(examples) for split, examples in splits.items()} == statistics.examples
    assert {example["category"] for examples in splits.values() for example in examples} <= {"open_qa", "closed_qa"}


def test_no_example_is_without_a_label(rows: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = Data(prompt_template=SHORT, tokenization=Tokenization(cutoff_len=16))
    _, splits = prepared(rows, tokenizer, data, tmp_path)
    for examples in splits.values():
        for example in examples:
            assert any(label != IGNORED for label in example["labels"][1:])  # type: ignore[index]
            assert len(example["input_ids"]) == len(example["labels"]) <= 16  # type: ignore[arg-type]


def test_choice_and_side_outlive_new_rows(rows: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Rows shuffled and others added: a row keeps its side, and of few samples the same are taken."""
    import pyarrow.parquet as pq

    table = pq.read_table(rows)
    half = table.take(pa.array(range(0, 800, 2)))
    pq.write_table(half, tmp_path / "half.parquet")
    data = Data(prompt_template=SHORT, num_samples=100, val_fraction=0.3)
    taken: list[dict[tuple[int, ...], str]] = []
    for name, source in (("all", rows), ("half", tmp_path / "half.parquet")):
        _, splits = prepared(source, tokenizer, data, tmp_path / name)
        taken.append({tuple(e["input_ids"]): split for split, es in splits.items() for e in es})  # type: ignore[arg-type]
    both = taken[0].keys() & taken[1].keys()
    assert len(both) > 30
    assert all(taken[0][ids] == taken[1][ids] for ids in both)


def test_duplicates_never_stand_on_both_sides(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    doubled = [json.dumps({**json.loads(line), "response": "another answer"}) for line in lines]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, *doubled]), encoding="utf-8")
    doubled_rows = ingest(tmp_path, tmp_path / "rows.jsonl")
    data = Data(prompt_template=SHORT, val_fraction=0.4, gate_fraction=0.1)
    _, splits = prepared(doubled_rows, tokenizer, data, tmp_path / "out")
    prompts = [{tuple(e["input_ids"][: e["prompt_length"]]) for e in es} for es in splits.values()]  # type: ignore
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 800


def test_packs_cover_the_train_split(rows: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = Data(tokenization=Tokenization(cutoff_len=192))
    statistics, splits = prepared(rows, tokenizer, data, tmp_path)
    packs = [pack["examples"] for pack in read(tmp_path / "packs.arrow")]
    lengths = [len(example["input_ids"]) for example in splits["train"]]  # type: ignore[arg-type]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))  # type: ignore[attr-defined]
    assert all(sum(lengths[i] for i in pack) <= 192 for pack in packs)  # type: ignore[attr-defined]
    assert statistics.sequences == len(packs) < len(lengths)
    assert statistics.fill == pytest.approx(sum(lengths) / 192 / len(packs), abs=1e-4)
    filled = [sum(lengths[i] for i in pack) / 192 for pack in packs]  # type: ignore[attr-defined]
    assert statistics.fill_histogram == np.histogram(filled, 20, (0, 1))[0].tolist()
    width, counts = statistics.length_histogram["width"], statistics.length_histogram["counts"]
    assert counts == np.histogram(lengths, len(counts), (0, width * len(counts)))[0].tolist()


def test_datasets_opens_the_files(rows: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    statistics, _ = prepared(rows, tokenizer, Data(), tmp_path)
    dataset = Dataset.from_file(str(tmp_path / "train.arrow"))
    assert len(dataset) == statistics.examples[Split.TRAIN]
    assert {"input_ids", "labels"} <= set(dataset.column_names)


def test_same_inputs_give_the_same_bytes(rows: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepared(rows, tokenizer, Data(num_samples=200), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_unknown_category_names_those_that_occur(
    rows: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"data\.categories.*'openqa'.*classification, closed_qa, open_qa"):
        prepared(rows, tokenizer, Data(categories=["openqa"]), tmp_path)


def test_too_short_a_cutoff_leaves_nothing_and_says_so(
    rows: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="cutoff_len"):
        prepared(rows, tokenizer, Data(tokenization=Tokenization(cutoff_len=8)), tmp_path)


def test_no_validation_row_is_told(rows: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="validation"):
        prepared(rows, tokenizer, Data(num_samples=3, val_fraction=0.001, gate_fraction=0.0), tmp_path)


def test_preview_shows_what_is_masked(rows: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    prepared(rows, tokenizer, Data(prompt_template=SHORT), tmp_path)
    preview = masked_tokens(tmp_path / "train.arrow", tokenizer, count=1)
    masked = [line for line in preview.splitlines() if line.startswith("- ")]
    learned = [line for line in preview.splitlines() if line.startswith("+ ")]
    assert masked
    assert masked[-1].endswith("R:")
    assert learned[-1].endswith("</s>")


def chats(path: Path, *conversations: list[str]) -> Path:
    """A file of conversations; every other turn is the assistant's, the first the user's."""
    with open(path, "w", encoding="utf-8") as file:
        for said in conversations:
            roles = ["user", "assistant"] * len(said)
            turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def test_conversation_that_goes_on_from_another_stands_on_its_side(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    conversations = []
    for i in range(60):
        opening = [f"Question {i}?", f"answer {i}"]
        conversations += [opening, [*opening, "And?", "more"], [f" question {i}? ", "another answer"]]
    rows = ingest(tmp_path, chats(tmp_path / "chats.jsonl", *conversations))
    chat = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    data = Data(val_fraction=0.4, prompt_template=PromptTemplate(chat_template=True))
    statistics, splits = prepared(rows, chat, data, tmp_path / "out")
    assert sum(statistics.examples.values()) == 180
    sides = {example["row"]: split for split, examples in splits.items() for example in examples}
    assert all(sides[i] == sides[i + 1] == sides[i + 2] for i in range(0, 180, 3))
    assert len(set(sides.values())) == 3


def test_refused_rows_are_counted_and_the_first_is_told(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = chats(tmp_path / "chats.jsonl", *[[f"q{i}", "a"] for i in range(40)], *[["q", "a", "q", "a"]] * 3)
    data = Data(prompt_template=SHORT, val_fraction=0.3)
    statistics, splits = prepared(ingest(tmp_path, path), tokenizer, data, tmp_path / "out")
    assert statistics.refused == 3
    assert "row 40 of dolly_raw" in statistics.first_refused
    assert sum(map(len, splits.values())) == 40
    assert max(example["row"] for examples in splits.values() for example in examples) == 39  # type: ignore[type-var]


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def numbers(splits: dict[str, list[dict[str, object]]]) -> dict[str, set[object]]:
    return {split: {example["row"] for example in examples} for split, examples in splits.items()}


def rows_with_near_duplicates(out: Path) -> Path:
    """200 questions, and each again with one word more and another answer."""
    texts = [" ".join(f"word{(i * 7 + j * j) % 997}" for j in range(50)) for i in range(200)]
    rows = [{"instruction": text, "response": "an answer"} for text in texts]
    rows += [{"instruction": f"{text} please", "response": "another"} for text in texts]
    return ingest(out, jsonl(out / "rows.jsonl", rows))


def test_training_rows_that_repeat_a_held_out_row_are_left_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = rows_with_near_duplicates(tmp_path)
    data = Data(prompt_template=SHORT, val_fraction=0.2, gate_fraction=0.1)
    kept, kept_splits = prepared(rows, tokenizer, replace(data, near_duplicate_threshold=None), tmp_path / "kept")
    statistics, splits = prepared(rows, tokenizer, data, tmp_path / "out")
    before, after = numbers(kept_splits), numbers(splits)
    assert (after["val"], after["gate"]) == (before["val"], before["gate"])
    held_out = before["val"] | before["gate"]
    expected = {row for row in before["train"] if (row + 200) % 400 in held_out}  # type: ignore[operator]
    assert before["train"] - after["train"] == expected
    assert statistics.near_duplicates_left_out == len(expected) > 20
    assert all((row + 200) % 400 == other for row, other in statistics.first_left_out)
    assert len(statistics.first_left_out) == 5
    assert (statistics.overlap, statistics.first_overlap) == (0, [])
    overlapping = sorted(row for row in held_out if (row + 200) % 400 in before["train"])  # type: ignore[operator, type-var]
    assert (kept.overlap, kept.first_overlap) == (len(overlapping), overlapping[:5])
    assert (kept.near_duplicates_left_out, kept.first_left_out) == (0, [])


def test_what_is_left_out_does_not_depend_on_the_order(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows, data = rows_with_near_duplicates(tmp_path), Data(prompt_template=SHORT, val_fraction=0.3)
    table = pq.read_table(rows)
    pq.write_table(table.take(pa.array(range(399, -1, -1))), tmp_path / "backwards.parquet")
    _, splits = prepared(rows, tokenizer, data, tmp_path / "a")
    _, backwards = prepared(tmp_path / "backwards.parquet", tokenizer, data, tmp_path / "b")
    for split, own in numbers(backwards).items():
        assert {399 - row for row in own} == numbers(splits)[split]  # type: ignore[operator]


def test_no_near_duplicate_is_left_in_training(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows, data = rows_with_near_duplicates(tmp_path), Data(prompt_template=SHORT, val_fraction=0.3)
    import pyarrow.parquet as pq

    statistics, splits = prepared(rows, tokenizer, data, tmp_path / "out")
    left = sorted(set.union(*numbers(splits).values()))  # type: ignore[type-var]
    pq.write_table(pq.read_table(rows).take(pa.array(left)), tmp_path / "left.parquet")
    again, _ = prepared(tmp_path / "left.parquet", tokenizer, data, tmp_path / "again")
    assert statistics.near_duplicates_left_out > 0
    assert (again.near_duplicates_left_out, again.examples) == (0, statistics.examples)


def test_arithmetic_prompts_are_different_prompts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    signs = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    asked = [(a, sign, b) for a in range(12) for b in range(12) for sign in signs]
    rows = [{"instruction": f"What is {a} {sign} {b}?", "response": str(signs[sign](a, b))} for a, sign, b in asked]
    data = Data(prompt_template=SHORT, val_fraction=0.2, near_duplicate_threshold=None)
    path = ingest(tmp_path, jsonl(tmp_path / "rows.jsonl", rows))
    statistics, _ = prepared(path, tokenizer, data, tmp_path / "kept")
    assert statistics.overlap == 0
    statistics, _ = prepared(path, tokenizer, replace(data, near_duplicate_threshold=0.8), tmp_path / "out")
    assert statistics.near_duplicates_left_out == 0
    assert sum(statistics.examples.values()) == len(rows)


def test_one_exchange_under_several_system_prompts_is_on_one_side(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [
        {"system": system, "instruction": f"Question {i}?", "response": f"answer {i}"}
        for i in range(100)
        for system in ("Be kind.", "Be brief.", "You are a pirate.")
    ]
    chat = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    data = Data(val_fraction=0.3, prompt_template=PromptTemplate(chat_template=True))
    path = ingest(tmp_path, jsonl(tmp_path / "rows.jsonl", rows))
    statistics, splits = prepared(path, chat, data, tmp_path / "out")
    sides = {split: {row // 3 for row in own} for split, own in numbers(splits).items()}  # type: ignore[operator]
    assert statistics.near_duplicates_left_out > 50
    assert not sides["train"] & (sides["val"] | sides["gate"])
    kept, _ = prepared(path, chat, replace(data, near_duplicate_threshold=None), tmp_path / "kept")
    assert kept.overlap > 50


def test_one_opening_for_all_conversations_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    chat = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    path = chats(tmp_path / "chats.jsonl", *[["Hi", "Hello!", f"Question {i}?", f"answer {i}"] for i in range(300)])
    data = Data(val_fraction=0.1, prompt_template=PromptTemplate(chat_template=True))
    with pytest.raises(DataError, match=r"300 of 300 rows.*'Hi'"):
        prepared(ingest(tmp_path, path), chat, data, tmp_path / "out")


def test_split_and_its_most_frequent_prompt_are_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"instruction": f"Question {i}?", "response": "a"} for i in range(100)]
    rows += [{"instruction": "Why?", "response": f"because {i}"} for i in range(30)]
    path = ingest(tmp_path, jsonl(tmp_path / "rows.jsonl", rows))
    statistics, splits = prepared(path, tokenizer, Data(prompt_template=SHORT, val_fraction=0.2), tmp_path / "out")
    assert (statistics.most_frequent_prompt, statistics.most_frequent_prompt_rows) == ("Why?", 30)
    assert statistics.drawn == {split: len(examples) for split, examples in splits.items()}
    assert sum(statistics.drawn.values()) == 130
