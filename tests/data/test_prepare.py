"""The prepared dataset: what is in it, what is not, and that every row is accounted for."""

import json
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
