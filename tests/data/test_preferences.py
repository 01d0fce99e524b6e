"""Judged rows: pairs and labelled answers, in every form, and those that are refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from judgements import configured, labelled, pairs, prepared, sample_rows

from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.errors import BadRow, DataError
from finetune_assets.data.layouts import RowReader
from finetune_assets.data.rows import RowKind, kind_of
from finetune_assets.training.order import read_packs

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
AGAIN, LATER = {"role": "user", "content": "When?"}, {"role": "assistant", "content": "In 1702."}
OTHER = {"role": "assistant", "content": "Go."}
UNLEARNED = {**SAID, "weight": 0.0}


def read(row: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return RowReader(Columns(**columns))(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go.", "score": 3},
        {"instruction": "Hi", "response": "Hello", "rejected": "Go."},
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]},
        {"prompt": "Hi", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]},
        {"chosen": json.dumps([ASKED, SAID]), "rejected": json.dumps([ASKED, OTHER])},
        {"messages": [ASKED], "chosen": "Hello", "rejected": "Go."},
        {"messages": [ASKED, SAID], "rejected_response": "Go."},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": SAID, "rejected": OTHER},
        {"prompt": "Hi", "chosen_response": "Hello", "rejected_responses": ["Go."]},
    ],
)
def test_forms_of_a_pair(row: dict[str, Any]) -> None:
    pair = read(row)
    assert [pair[name] for name in ("instruction", "response", "rejected")] == ["Hi", "Hello", "Go."]
    assert kind_of(pair) is RowKind.PAIR


def test_only_what_is_judged_is_learned() -> None:
    """Assistant turns of the prompt are not, whether it is given alone or shared by two conversations."""
    shared = [ASKED, SAID, AGAIN]
    for row in (
        {"chosen": [*shared, LATER], "rejected": [*shared, OTHER]},
        {"prompt": shared, "chosen": [LATER], "rejected": "Go."},
        {"messages": [*shared, LATER], "rejected": "Go."},
    ):
        pair = read(row)
        assert pair["messages"] == [ASKED, UNLEARNED, AGAIN, LATER]
        assert pair["rejected_messages"] == [ASKED, UNLEARNED, AGAIN, OTHER]
    assert read({"messages": [*shared, LATER], "label": False})["messages"] == [ASKED, UNLEARNED, AGAIN, LATER]


@pytest.mark.parametrize(
    ("judgement", "columns", "label"),
    [
        ({"label": True}, {}, True),
        ({"label": "False"}, {}, False),
        ({"kto_tag": False}, {}, False),
        ({"thumbs": "up"}, {}, True),
        ({"thumbs": "👎"}, {}, False),
        ({"thumbs": -1.0}, {}, False),
        ({"feedback": 1}, {"label": "feedback"}, True),
        ({"label": 1}, {}, None),
        ({"label": "positive"}, {}, None),
    ],
)
def test_labels(judgement: dict[str, Any], columns: dict[str, str], label: bool | None) -> None:
    """A number or word in `label` is usually a class, unless the settings name the column."""
    assert read({"prompt": "Hi", "completion": "Hello", **judgement}, **columns).get("label") is label


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({"prompt": "Hi", "chosen": "a"}, ["'rejected'", "'chosen'"]),
        ({"prompt": "Hi", "rejected": "a"}, ["'chosen'", "'rejected'"]),
        ({"prompt": "Hi", "chosen": "a", "rejected": " "}, ["'rejected'", "blank"]),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a "}, ["'chosen'", "'rejected'", "equal"]),
        ({"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}, ["'chosen'", "'rejected'", "equal"]),
        ({"chosen": [ASKED, SAID], "rejected": [AGAIN, LATER]}, ["'chosen'", "'rejected'", "prompt"]),
        ({"chosen": [ASKED, SAID, AGAIN, LATER], "rejected": [ASKED, SAID]}, ["turn 3", "'rejected'"]),
        ({"chosen": [ASKED, SAID], "rejected": [ASKED]}, ["'rejected'", "assistant"]),
        ({"chosen": "Human: Hi", "rejected": "Human: Hi"}, ["'chosen'", "'instruction'"]),
        ({"prompt": "Hi", "chosen": 3, "rejected": "a"}, ["'chosen'", "3"]),
        ({"prompt": "Hi", "chosen": "a", "rejected": ["b"]}, ["'rejected'", '["b"]']),
        ({"prompt": "Hi", "chosen": "a", "rejected_responses": ["b", "c"]}, ["'rejected_responses'", "2"]),
        (
            {"prompt": "Hi", "chosen": "a", "chosen_response": "b", "rejected": "c"},
            ["'chosen_response'", "columns.chosen"],
        ),
        ({"prompt": "Hi", "response": "z", "chosen": "a", "rejected": "c"}, ["'response'", "'chosen'"]),
        ({"prompt": "Bye", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}, ["'prompt'", '"Bye"']),
        ({"prompt": "Hi", "chosen": [{"role": "asistant", "content": "a"}], "rejected": "c"}, ["'chosen'", "asistant"]),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "label": True}, ["'chosen'", "'label'"]),
        ({"prompt": "Hi", "completion": "a", "label": True, "kto_tag": False}, ["'label'", "'kto_tag'"]),
        ({"prompt": "Hi", "completion": "a", "thumbs": "sideways"}, ["'thumbs'", "sideways"]),
        ({"prompt": "Hi", "label": True}, ["'response'"]),
    ],
)
def test_judged_rows_that_are_refused(row: dict[str, Any], facts: list[str]) -> None:
    with pytest.raises(BadRow) as error:
        read(row)
    assert all(fact in str(error.value) for fact in facts), str(error.value)


ALL = [*pairs(30), *labelled(60)[30:], *sample_rows(110)[90:]]


@pytest.mark.parametrize(
    ("objective", "kinds", "others"),
    [
        ("sft", {"instruction"}, {"pair", "labelled"}),
        ("dpo", {"instruction", "pair"}, {"labelled"}),
        ("kto", {"instruction", "pair", "labelled"}, set()),
    ],
)
def test_each_row_is_learned_by_its_objective(
    objective: str, kinds: set[str], others: set[str], tmp_path: Path
) -> None:
    """Both answers of a pair are adjacent, in one split, and with dpo in one packed sequence."""
    config = configured(f"training.objective={objective}", "data.near_duplicate_threshold=null")
    out = prepared(tmp_path / "data", ALL, config)
    rows = [json.loads(line) for line in (tmp_path / "data" / "rows.jsonl").read_text().splitlines()]
    found, splits = set(), dict[int, str]()
    for split in ("train", "val", "gate"):
        table = pa.ipc.open_stream(str(out / f"{split}.arrow")).read_all()
        if objective == "sft":
            assert "pair" not in table.schema.names
        examples = table.to_pylist()
        found |= {
            "pair" if "rejected" in rows[e["row"]] else "labelled" if "label" in rows[e["row"]] else "instruction"
            for e in examples
        }
        assert all(splits.setdefault(example["row"], split) == split for example in examples)
        chosen = [number for number, example in enumerate(examples) if example.get("chosen")]
        for number in chosen:
            good, bad = examples[number], examples[number + 1]
            assert (good["pair"], bad["pair"], bad["chosen"]) == (good["row"], good["row"], False)
            assert good["input_ids"][: good["prompt_length"]] == bad["input_ids"][: bad["prompt_length"]]
            assert (good["desirable"], bad["desirable"]) == ((True, False) if objective == "kto" else (None, None))
        if split == "train" and objective == "dpo":
            packs = {example: number for number, pack in enumerate(read_packs(out) or []) for example in pack}
            assert chosen
            assert all(packs[number] == packs[number + 1] for number in chosen)
    assert found == kinds
    assert len(splits) == sum(
        ("pair" if "rejected" in row else "labelled" if "label" in row else "instruction") in kinds for row in rows
    )
    assert found.isdisjoint(others)


def test_instruction_rows_of_weight_0_are_held_out_only(tmp_path: Path) -> None:
    config = configured("training.objective=dpo", "training.preference.instruction_weight=0")
    out = prepared(tmp_path / "data", ALL, config)
    train, val = (pa.ipc.open_stream(str(out / f"{split}.arrow")).read_all() for split in ("train", "val"))
    assert train["pair"].null_count == 0
    assert val["pair"].null_count > 0


def test_a_dataset_without_judged_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="chosen"):
        prepared(tmp_path / "data", sample_rows(40), configured("training.objective=dpo"))


def test_pairs_that_differ_only_beyond_the_cutoff_teach_nothing(tmp_path: Path) -> None:
    """They are counted as rows without a label."""
    long = " ".join(["word"] * 200)
    alike = [{"instruction": f"Say {n}.", "chosen": f"{long} a", "rejected": f"{long} b"} for n in range(5)]
    out = prepared(tmp_path / "data", [*pairs(40), *alike], configured("training.objective=dpo"))
    numbers = {row for split in ("train", "val", "gate") for row in _rows(out / f"{split}.arrow")}
    assert numbers
    assert numbers.isdisjoint(range(len(pairs(40)), len(pairs(40)) + 5))


def _rows(stream: Path) -> list[int]:
    rows: list[int] = pa.ipc.open_stream(str(stream)).read_all()["row"].to_pylist()
    return rows
