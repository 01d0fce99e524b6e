"""What counts in each mode: citations, refusals, and what may be lost elsewhere."""

from pathlib import Path

import numpy as np
import pytest
from raw import ingest
from retrieval.towns import REFUSAL, TOWNS, data, index, rows, write_rows
from transformers import AutoTokenizer

from finetune_assets.config.schema import ExperimentConfig, Gate
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.rows import draw, side_of
from finetune_assets.data.tokenization import Encoder
from finetune_assets.evaluation.gate import Gain, judge
from finetune_assets.evaluation.metrics.token_f1 import token_f1
from finetune_assets.evaluation.modes import MeasuredMode, Modes, comparable, mode_results
from finetune_assets.evaluation.rows import held_out, raw_rows_of, rendered
from finetune_assets.retrieval.contexts import RowContexts
from finetune_assets.sources.base_models import PACKAGED


def asked(town: str) -> tuple[str, str]:
    """Instruction and context of the first row about a town."""
    return next((row["instruction"], row["context"]) for row in rows() if town in row["instruction"])


def test_token_f1_is_of_words_in_any_order() -> None:
    assert token_f1("Oil and salt.", "salt and oil") == 1
    assert token_f1("oil oil", "oil") == pytest.approx(2 / 3)
    assert token_f1("wool", "salt") == token_f1("", "salt") == 0


@pytest.mark.parametrize(("increase", "promoted"), [(0.1, True), (0.11, False), (float("nan"), False)])
def test_what_may_be_lost_in_another_mode_is_bounded(increase: float, promoted: bool) -> None:
    gate = Gate(max_loss_of={"closed_book": 0.1})
    verdict = judge(Gain(0.5, 0.4, 0.95, 100), None, gate, "the base", "retrieved", {"closed_book": increase})
    assert verdict.promote == promoted
    assert ("gate.max_loss_of.closed_book" in verdict.reason) == (not promoted)


def test_citations_and_refusals_are_those_of_the_answers(tmp_path: Path) -> None:
    """One town has no document, so questions about it are to be refused."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED["demo-base"])
    config = ExperimentConfig(data=data(cite=True, without_golden="refuse", refusal=REFUSAL))
    raw = ingest(tmp_path / "raw", write_rows(tmp_path / "rows.jsonl"))
    assert config.data.retrieval
    encoder, dataset = Encoder(tokenizer, config.data), tmp_path / "dataset"
    split, gone = "gate", next(town for town in TOWNS if side_of(draw(*asked(town), "salt"), config.data) == "gate")
    contexts = RowContexts(index(tmp_path / "index", without=gone), config.data.retrieval, "salt", encoder, 256)
    dataset.mkdir()
    prepare_dataset(raw, tokenizer, config.data, "salt", dataset, contexts)
    held = held_out(dataset, split, config.data)
    own = raw_rows_of(held, [raw])
    modes = Modes(config, contexts, dataset, split, own)
    again = rendered(modes.rows["retrieved"], tokenizer, config.data)
    assert again.examples.ids.to_pylist() == held.examples.ids.to_pylist(), "as the dataset has them"

    def measured(mode: str, answers: list[str | None]) -> MeasuredMode:
        drawn = rendered(modes.rows[mode], tokenizer, config.data)
        return MeasuredMode(drawn, np.ones(len(own)), answers, [row["response"] for row in own])

    cites = {
        mode: [
            f"{row['response']} [{given['passages'].index(given['golden'][0]) + 1}]"
            if {*given["golden"]} & {*given["passages"]}
            else REFUSAL
            for row, given in zip(own, found, strict=True)
        ]
        for mode, found in modes.rows.items()
    }
    all_of_them = np.ones(len(own), bool)
    perfect = mode_results(modes, {mode: {"base": measured(mode, cites[mode])} for mode in modes.rows}, all_of_them)
    about_gone = sum(gone in row["instruction"] for row in own)
    assert about_gone
    for mode, result in perfect["modes"].items():
        metrics = result["contenders"]["base"]
        assert result["golden_rows"] == (0 if mode == "closed_book" else len(own) - about_gone)
        if mode != "closed_book":
            assert (metrics["exact_match"], metrics["citations"], metrics["false_refusals"]) == (1, 1, 0)
            assert result["rows"] == len(own) - about_gone, "those to be refused are not compared with an answer"
    assert perfect["modes"]["retrieved"]["contenders"]["base"]["refusals"] == 1
    assert perfect["modes"]["closed_book"]["rows"] == len(own)
    wrong = {mode: {"base": measured(mode, [f"{row['response']} [9]" for row in own])} for mode in modes.rows}
    metrics = mode_results(modes, wrong, all_of_them)["modes"]["retrieved"]["contenders"]["base"]
    assert (metrics["exact_match"], metrics["citations"], metrics["refusals"]) == (1, 0, 0)
    silent = measured("retrieved", [None] * len(own))
    assert comparable(modes, "retrieved", {"base": silent}, all_of_them).sum() == len(own) - about_gone
