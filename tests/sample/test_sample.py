"""The packaged sample and base: what they promise, and that the scripts still make them."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from raw import rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_assets.sample.towns import documents, new_towns, question_rows
from finetune_assets.sample.world import instruction_rows, make_world, prose
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE, SAMPLE_TOWNS

BASE = PACKAGED["demo-base"]


def test_packaged_rows_are_what_the_script_writes() -> None:
    assert [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()] == instruction_rows(
        make_world()
    )


def test_sample_is_large_enough_and_asks_nothing_twice(tmp_path: Path) -> None:
    rows = rows_of(SAMPLE, out=tmp_path)
    assert len(rows) >= 600
    assert len({(row["instruction"], row["context"]) for row in rows}) == len(rows)
    assert set(Counter(row["category"] for row in rows)) == {"open_qa", "closed_qa", "classification"}


def test_every_fact_asked_for_is_true(tmp_path: Path) -> None:
    world = make_world()
    for row in rows_of(SAMPLE, out=tmp_path):
        if row["category"] == "open_qa":
            (town,) = [town for town in world.facts if town in row["instruction"]]
            assert row["response"] in world.facts[town].values()
        if row["category"] == "closed_qa":
            assert row["response"] in row["context"]


def test_packaged_documents_and_their_questions_are_what_the_script_writes() -> None:
    world, folder = new_towns(), SAMPLE_TOWNS.with_name("documents")
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == dict(documents(world))
    lines = SAMPLE_TOWNS.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == question_rows(world)


@pytest.mark.system
def test_only_the_documents_answer_questions_about_new_towns() -> None:
    """No town is one that the base has read about, each is asked about once, and one paragraph has the answer."""
    world, text = new_towns(), "\n".join(text for _, text in documents(new_towns()))
    assert not world.facts.keys() & make_world().facts.keys()
    asked = Counter[str]()
    for row in question_rows(world):
        (town,) = [town for town in world.facts if town in row["instruction"].rstrip("?.").split()]
        asked[town] += 1
        assert text.count(f"\n{row['context']}\n") == 1
        assert row["response"] in row["context"]
        assert row["response"] in world.facts[town].values()
    assert {*asked.values()} == {1}
    assert asked.keys() == world.facts.keys()


def test_prose_never_asks() -> None:
    documents = prose(make_world(), seed=3)
    assert not any("?" in next(documents) for _ in range(2_000))


def test_base_is_small_and_knows_the_facts_as_prose() -> None:
    assert (BASE / "model.safetensors").stat().st_size < 8_000_000
    from finetune_assets.sample.build import recall

    world = make_world()
    few = type(world)(dict(list(world.facts.items())[:12]))
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    assert recall(few, model, AutoTokenizer.from_pretrained(BASE)) >= 0.95


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_base_is_whole(name: str) -> None:
    assert (BASE / name).is_file()
