"""Passages in rows: which, in what order, what is answered then, and what no training row is given."""

import pickle
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from raw import ingest
from retrieval.towns import GOODS, REFUSAL, TOWNS, data, index, passage, rows, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_assets.config.schema import Data
from finetune_assets.data import processes, selection
from finetune_assets.data.errors import RefusedRow
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.prompt_boundary import prompt_boundary
from finetune_assets.data.rows import Row, Split
from finetune_assets.data.tokenization import IGNORED, Encoder
from finetune_assets.retrieval.citations import cited, with_citations, without_citations
from finetune_assets.retrieval.contexts import Mode, RowContexts, held_out_passages
from finetune_assets.retrieval.passages import passage_id
from finetune_assets.retrieval.statistics import passage_statistics, unseen_passages
from finetune_assets.sources.base_models import PACKAGED

ROWS = rows()
ID = {town: passage_id(passage(town)) for town in TOWNS}
Make = Callable[..., RowContexts]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PACKAGED["demo-base"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return index(tmp_path_factory.mktemp("index") / "towns")


@pytest.fixture
def contexts(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Make:
    def make(where: Path = folder, salt: str = "salt", cutoff_len: int = 256, **settings: Any) -> RowContexts:
        experiment = data(cutoff_len, **settings)
        assert experiment.retrieval
        return RowContexts(where, experiment.retrieval, salt, Encoder(tokenizer, experiment), cutoff_len)

    return make


def applied(contexts: RowContexts, mode: Mode, of: list[Row] = ROWS) -> list[Row]:
    found = contexts.apply(of, mode)
    assert not any(isinstance(row, RefusedRow) for row in found)
    return found  # type: ignore[return-value]


def with_golden(row: Row) -> bool:
    return bool({*row["golden"]} & {*row["passages"]})


def test_each_mode_gives_its_passages(contexts: Make) -> None:
    made = contexts()
    assert {row["context"] for row in applied(made, Mode.CLOSED_BOOK)} == {""}
    for row, golden in zip(ROWS, applied(made, Mode.GOLDEN), strict=True):
        assert golden["context"] == f"[1] {row['context']}"
    both, retrieved = applied(made, Mode.GOLDEN_AND_DISTRACTORS), applied(made, Mode.RETRIEVED)
    hits = made.index.search([row["instruction"] for row in ROWS], 4)
    ids = made.index.passages.ids
    for shown, served, found in zip(both, retrieved, hits, strict=True):
        assert served["passages"] == [ids[hit.passage] for hit in found[:3]], "best first"
        wrong = [ids[hit.passage] for hit in found if ids[hit.passage] not in shown["golden"]]
        assert {*shown["passages"]} == {*shown["golden"], *wrong[:2]}, "the highest-ranked wrong ones"
        assert [part[:3] for part in shown["context"].split("\n\n")] == ["[1]", "[2]", "[3]"]
    assert sum(row["passages"][0] in row["golden"] for row in both) in range(20, 50), "in any place"
    assert all(row["response"] == before["response"] for row, before in zip(both, ROWS, strict=True))


def test_each_setting_acts(contexts: Make) -> None:
    usual = applied(contexts(), Mode.TRAINING)
    assert sum(map(with_golden, usual)) in range(65, 95), "about eight of ten"
    assert all(with_golden(row) for row in applied(contexts(golden_share=1.0), Mode.TRAINING))
    assert not any(with_golden(row) for row in applied(contexts(golden_share=0.0), Mode.TRAINING))
    assert {len(row["passages"]) for row in applied(contexts(passages=2), Mode.TRAINING)} == {2}
    fewer = contexts(fewest_passages=1, golden_share=1.0)
    counts = Counter(len(row["passages"]) for row in applied(fewer, Mode.TRAINING))
    assert counts.keys() == {1, 2, 3}
    assert min(counts.values()) > 20, "about a third each"
    assert all(with_golden(row) for row in applied(fewer, Mode.TRAINING))
    assert {len(row["passages"]) for row in applied(fewer, Mode.RETRIEVED)} == {3}
    random_ones = applied(contexts(distractors="random", golden_share=1.0), Mode.TRAINING)
    assert {len({*row["passages"]}) for row in random_ones} == {3}
    assert [row["passages"] for row in random_ones] != [row["passages"] for row in usual]
    ranked = applied(contexts(order="ranked", golden_share=1.0), Mode.TRAINING)
    served = applied(contexts(), Mode.RETRIEVED)
    assert [row["passages"] for row in ranked if row["passages"] in [other["passages"] for other in served]]
    assert sum(row["passages"][0] in row["golden"] for row in ranked) > 95, "the town is named in the question"
    cites = applied(contexts(cite=True), Mode.TRAINING)
    for row, before in zip(cites, ROWS, strict=True):
        numbers = [number for number, id in enumerate(row["passages"], 1) if id in row["golden"]]
        assert (cited(row["response"]), without_citations(row["response"])) == (numbers, before["response"])
    refusing = contexts(without_golden="refuse", refusal=REFUSAL, golden_share=0.5)
    answers = {with_golden(row): row["response"] for row in applied(refusing, Mode.TRAINING)}
    assert answers[False] == REFUSAL
    assert answers[True] != REFUSAL
    assert REFUSAL not in {row["response"] for row in applied(refusing, Mode.CLOSED_BOOK)}
    assert cited(with_citations("Paris.", [1, 3])) == [1, 3]
    assert cited("in [2] days") == []


def test_choices_are_of_content_and_salt_alone(contexts: Make) -> None:
    made = contexts(distractors="random")
    whole = {row["instruction"]: row["context"] for row in applied(made, Mode.TRAINING)}
    some = random.Random(0).sample(ROWS, 30)
    again = pickle.loads(pickle.dumps(made))
    assert {row["instruction"]: row["context"] for row in applied(again, Mode.TRAINING, some)}.items() <= whole.items()
    salted = applied(contexts(distractors="random", salt="other"), Mode.TRAINING)
    assert {row["instruction"]: row["context"] for row in salted} != whole


def test_passages_that_do_not_fit_are_dropped_worst_first_and_no_answer_is_cut(
    contexts: Make, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = applied(contexts(golden_share=1.0), Mode.TRAINING)
    lengths = Encoder(tokenizer, data()).lengths(whole)
    cutoff = sorted(lengths)[len(lengths) // 2] - 1
    made = contexts(cutoff_len=cutoff, golden_share=1.0)
    short = applied(made, Mode.TRAINING)
    encoded = made.encoder.encode(short)  # type: ignore[attr-defined]
    assert not encoded.truncated.any()
    dropped = [row["dropped_passages"] for row in short]
    assert dropped == [int(length > cutoff) for length in lengths], "one is enough"
    for row, before in zip(short, whole, strict=True):
        assert with_golden(row)
        assert [id for id in before["passages"] if id in row["passages"]] == row["passages"]
    tiny = applied(contexts(cutoff_len=20, golden_share=1.0), Mode.TRAINING)
    assert {(row["context"], row["dropped_passages"]) for row in tiny} == {("", 3)}
    assert [row["response"] for row in tiny] == [row["response"] for row in ROWS]
    served = applied(contexts(cutoff_len=cutoff), Mode.RETRIEVED)
    for row, all_of_it in zip(served, applied(contexts(), Mode.RETRIEVED), strict=True):
        assert row["passages"] == all_of_it["passages"][: len(row["passages"])], "whether golden or not"


def test_row_whose_golden_passage_is_not_in_the_documents(contexts: Make, tmp_path: Path) -> None:
    gone = TOWNS[7]
    made = contexts(index(tmp_path / "index", without=gone), without_golden="refuse", refusal=REFUSAL, golden_share=1.0)
    for row in applied(made, Mode.TRAINING):
        about_gone = gone in row["instruction"]
        assert (row["golden"] == [], row["response"] == REFUSAL, with_golden(row)) == (
            about_gone,
            about_gone,
            not about_gone,
        )
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    (refused,) = made.apply([{**ROWS[0], "messages": turns}], Mode.TRAINING)
    assert isinstance(refused, RefusedRow)


def prepared(
    folder: Path, tokenizer: PreTrainedTokenizerBase, experiment: Data, raw: Path, out: Path
) -> dict[str, list[Row]]:
    out.mkdir()
    assert experiment.retrieval
    longest = experiment.tokenization.cutoff_len
    hidden = held_out_passages([raw], folder, experiment, "salt")
    made = RowContexts(folder, experiment.retrieval, "salt", Encoder(tokenizer, experiment), longest, hidden)
    prepare_dataset(raw, tokenizer, experiment, "salt", out, made)
    found = prompt_boundary(out / "train.arrow", [raw], tokenizer, experiment, contexts=made)
    assert found.compared > 30
    assert found.changed < found.compared
    return {split: pa.ipc.open_stream((out / f"{split}.arrow").read_bytes()).read_all().to_pylist() for split in Split}


def test_dataset_learns_no_passage_and_no_held_out_answer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is the same with two processes, in batches of other sizes."""
    raw = ingest(tmp_path / "raw", write_rows(tmp_path / "rows.jsonl"))
    experiment = data(without_golden="refuse", refusal=REFUSAL, golden_share=0.7)
    splits = prepared(folder, tokenizer, experiment, raw, tmp_path / "one")
    held_out = {id for split in (Split.VAL, Split.GATE) for row in splits[split] for id in row["golden"]}
    for row in splits[Split.TRAIN]:
        assert not held_out & ({*row["passages"]} - {*row["golden"]}), "a distractor is no held-out row's passage"
        learned = tokenizer.decode(
            [id for id, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        )
        own = ROWS[row["row"]]["response"] if with_golden(row) else REFUSAL
        assert learned.replace(tokenizer.eos_token, "").strip() == own
    statistics = passage_statistics(tmp_path / "one")
    for split, examples in splits.items():
        counts = statistics[split]
        shown = sum(map(with_golden, examples))
        assert (counts["golden_rows"], counts["without_golden_rows"]) == (shown, len(examples) - shown)
        assert counts["unknown_golden_rows"] == counts["dropped_passages"] == 0
    seen = {id for row in splits[Split.TRAIN] for id in row["golden"]}
    unseen = [not {*row["golden"]} & seen for row in splits[Split.GATE]]
    assert unseen_passages(tmp_path / "one", Split.GATE).tolist() == unseen
    assert 0 < sum(unseen) == statistics[Split.GATE]["unseen_passage_rows"] < len(unseen)
    monkeypatch.setattr(selection, "ROWS_PER_BATCH", 13)
    experiment.processes = "2"
    assert processes.process_count("2", 100, 1) == 2
    prepared(folder, tokenizer, experiment, raw, tmp_path / "two")
    for split in Split:
        read = [
            pa.ipc.open_stream((tmp_path / name / f"{split}.arrow").read_bytes()).read_all() for name in ("one", "two")
        ]
        assert read[0].to_pylist() == read[1].to_pylist()


def test_control_is_trained_without_passages_and_measured_with_them(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    raw = ingest(tmp_path / "raw", write_rows(tmp_path / "rows.jsonl"))
    control = prepared(folder, tokenizer, data(closed_book=True), raw, tmp_path / "control")
    usual = prepared(folder, tokenizer, data(), raw, tmp_path / "usual")
    assert all(row["passages"] == [] for row in control[Split.TRAIN])
    assert [row["row"] for row in control[Split.TRAIN]] == [row["row"] for row in usual[Split.TRAIN]]
    assert control[Split.GATE] == usual[Split.GATE]
    assert {goods for row in control[Split.TRAIN] for goods in GOODS if goods in tokenizer.decode(row["input_ids"])}
