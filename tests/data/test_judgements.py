"""Judgements of a dataset as a whole: contradictions, lengths, the adapters that answered, and the split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from paths import ROOT
from raw import ingest, quarantined

from finetune_assets.config.loading import load_experiment
from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.dataset_statistics import Statistics
from finetune_assets.data.judgements import length_bias
from finetune_assets.data.learning import Learning
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.sources.base_models import PACKAGED

Prepare = Callable[..., Statistics]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """Prepares a dataset of judgements in `tmp_path`."""

    def make(rows: list[dict[str, Any]], objective: str, columns: Columns | None = None, **data: Any) -> Statistics:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        raw = ingest(tmp_path / "raw", tmp_path / "rows.jsonl", columns=columns)
        config = load_experiment(ROOT / "configs", "demo", [f"training.objective={objective}"]).config
        for name, value in data.items():
            setattr(config.data, name, value)
        tokenizer = load_tokenizer(str(PACKAGED["demo-base"]))
        learning = Learning.of(config.training)
        return prepare_dataset(raw, tokenizer, config.data, "salt", tmp_path, learning=learning)

    return make


def pair(prompt: str, chosen: str, rejected: str, **more: str) -> dict[str, str]:
    return {"instruction": prompt, "chosen": chosen, "rejected": rejected, **more}


def labelled(prompt: str, response: str, label: bool, **more: str) -> dict[str, Any]:
    return {"instruction": prompt, "response": response, "label": label, **more}


def test_contradictions_are_counted_and_rankings_are_none(prepare: Prepare, tmp_path: Path) -> None:
    rows = [
        pair("Where does Kelm lie?", "Lowfen", "Midvale"),
        pair("Where does Kelm lie?", "Midvale", "Lowfen"),
        pair("Where does Vela lie?", "Lowfen", "Midvale"),
        pair("Where does Vela lie?", "Midvale", "Highdale"),
        pair("Where does Tor lie?", "Midvale", "Midvale"),
        pair("Where does Asha lie?", "Lowfen", "Midvale"),
        pair("Where does Asha lie?", "Lowfen", "Midvale"),
        labelled("Who came?", "Tavi", True),
        labelled("Who came?", "Mira", False),
        labelled("Who came?", "Tavi", False),
        labelled("Who came to Tor?", "Tavi", True),
    ]
    found = prepare(rows, "kto", val_fraction=0.0, gate_fraction=0.0)
    assert [entry["line"] for entry in quarantined(tmp_path / "raw")] == [5], "equal answers"
    assert (found.pairs["train"], found.labelled["train"]) == (6, 4)
    assert found.conflicting == 4
    assert found.first_conflicting == [(0, 1), (1, 0), (6, 8), (8, 6)]


def test_lengths_and_adapters_of_the_judged_answers_are_known(prepare: Prepare) -> None:
    long = "Lowfen, where the river runs and boats sail"
    rows = [
        pair("Where does Kelm lie?", long, "Midvale", model="demo-1-0a1b2c3d"),
        pair("Where does Vela lie?", long, "Midvale", model="demo-1-0a1b2c3d"),
        pair("Where does Asha lie?", long, "Midvale", model="demo-2-4e5f6a7b"),
        {"instruction": "Where does Tor lie?", "response": "Midvale", "model": "gpt"},
    ]
    found = prepare(rows, "dpo", Columns(adapter="model"), val_fraction=0.0, gate_fraction=0.0)
    assert found.adapters == {"demo-1-0a1b2c3d": 2, "demo-2-4e5f6a7b": 1}, "an instruction has no judged answer"
    chosen, rejected = found.judged_tokens["chosen"], found.judged_tokens["rejected"]
    assert length_bias(found.judged_tokens) == pytest.approx(chosen / rejected - 1)
    assert length_bias(found.judged_tokens) > 2
    assert length_bias({}) == 0


def test_no_prompt_has_pairs_on_both_sides_of_the_split(prepare: Prepare, tmp_path: Path) -> None:
    """Nor a held-out prompt in training that is nearly the same; both answers of a pair are adjacent."""
    regions = ["Lowfen", "Midvale", "Highdale"]
    prompts = [f"Where does the town of {start}{end} lie?" for start in ("Vel", "Kar", "Tor") for end in "abcdefghij"]
    rows = [pair(prompt, regions[0], other) for prompt in prompts for other in regions[1:]]
    rows += [pair(prompt.upper().replace("?", " ?"), regions[1], regions[2]) for prompt in prompts]
    found = prepare(rows, "dpo", val_fraction=0.2, gate_fraction=0.2, near_duplicate_threshold=1.0)
    sides: dict[str, set[str]] = {}
    folded: dict[str, set[bool]] = {}
    for split in ("train", "val", "gate"):
        table = pa.ipc.open_stream(pa.memory_map(str(tmp_path / f"{split}.arrow"))).read_all()
        assert table["chosen"].to_pylist() == [True, False] * (len(table) // 2)
        assert table["pair"].to_pylist() == table["row"].to_pylist()
        assert len(table) > 4
        for number in table["row"].to_pylist():
            prompt = rows[number]["instruction"]
            sides.setdefault(prompt, set()).add(split)
            folded.setdefault(prompt.casefold().replace(" ?", "?"), set()).add(split == "train")
    assert {len(splits) for splits in (*sides.values(), *folded.values())} == {1}
    assert found.near_duplicates_left_out > 0
    assert sum(found.pairs.values()) + found.near_duplicates_left_out == len(rows)
