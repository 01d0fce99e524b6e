"""Checks of `tokenized_dataset` that warn: rows left out, fractions of the splits, and text of the evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from integration.graph import Graph
from projects import TestProject

from finetune_assets.data.contamination import Contamination, contamination
from finetune_assets.data.texts import PACKAGED
from finetune_assets.sources.local import SAMPLE

ASSETS = ["dolly_raw", "cached_base_model", "tokenized_dataset"]
KEEP = ("data.near_duplicate_threshold=null", "data.checks.max_overlap_share=1.0")
"""Overrides with which rows of nearly the same words stay."""


def evaluated(
    project: TestProject,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, str]],
    *overrides: str,
    blocks: bool = False,
) -> dict[str, dg.AssetCheckEvaluation]:
    (project.root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setenv("FINETUNE_RAW_DATA", "./rows.jsonl")
    result = Graph().run(ASSETS, "demo", ["data.checks.max_truncated_share=1.0", *overrides]).result
    assert result.success is not blocks
    return {check.check_name: check for check in result.get_asset_check_evaluations()}


@pytest.mark.parametrize(("how", "count"), [("minhash", 40), ("folded", 10)])
def test_how_near_duplicate_rows_are_found_is_a_setting(
    project: TestProject, monkeypatch: pytest.MonkeyPatch, how: str, count: int
) -> None:
    texts = [" ".join(f"word{i * j}" for j in range(50)) for i in range(1, 31)]
    rows = [{"instruction": text, "response": "So"} for text in [*texts, *(f"{text} please" for text in texts)]]
    rows += [{"instruction": f"{text}!", "response": "so"} for text in texts[:10]]
    settings = project.root / "configs" / "raw_data.yaml"
    settings.write_text(
        f"{settings.read_text(encoding='utf-8')}\nchecks: {{near_duplicates: {how}}}\n", encoding="utf-8"
    )
    (project.root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setenv("FINETUNE_RAW_DATA", "./rows.jsonl")
    result = Graph().run(["dolly_raw"], None, []).result
    (check,) = (one for one in result.get_asset_check_evaluations() if one.check_name == "near_duplicates")
    assert check.metadata["rows"].value == count
    assert not check.passed
    assert "row 60 repeats row 0" in str(check.description) or how == "minhash"


def test_the_sample_passes_every_check(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    checks = evaluated(project, monkeypatch, rows)
    assert {name for name, check in checks.items() if not check.passed} == set()
    assert checks["contamination"].metadata["texts"].value > 0


def test_warnings_name_their_rows(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows with one of two prompts, and 200 questions on two long texts; one answer is text of the evaluation."""
    letters = "abcdefghijklmnop"
    texts = [" ".join(f"{name} {letter}" for letter in letters * 3) for name in ("the", "of")]
    words = [first + second for first in letters for second in letters][:200]
    rows = [
        {"instruction": f"What is {word}?", "context": f"{texts[i % 2]} {word[0]}", "response": word}
        for i, word in enumerate(words)
    ]
    rows += [{"instruction": "Say something", "response": f"Something {i}"} for i in range(300)]
    prose = PACKAGED["general"].read_text(encoding="utf-8").split()
    rows.append({"instruction": "Write on", "response": " ".join(prose[5:40])})
    checks = evaluated(
        project, monkeypatch, rows, "evaluation.general_text=general", "data.tokenization.cutoff_len=512"
    )
    assert {name for name, check in checks.items() if not check.passed} == {
        "left_out",
        "split_fractions",
        "contamination",
        "prompt_boundary",
    }
    assert all(check.severity is dg.AssetCheckSeverity.WARN for check in checks.values() if not check.passed)
    assert "300 rows" in str(checks["split_fractions"].description)
    assert "'Say something'" in str(checks["split_fractions"].description)
    assert checks["left_out"].metadata["rows"].value > 100
    assert checks["contamination"].metadata["rows"].value == 1
    assert "row 500" in str(checks["contamination"].description)


def test_rows_are_searched_again_for_other_texts_only(
    project: TestProject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The dataset is found in the store each time; its rows are read once for each text."""
    copied = " ".join(PACKAGED["general"].read_text(encoding="utf-8").split()[5:40])
    rows = [{"instruction": f"What is number {i}?", "response": f"Number {i}"} for i in range(100)]
    rows.append({"instruction": "Write on", "response": copied})
    searched = list[int]()

    def counting(rows: Any, texts: Sequence[str]) -> Contamination:
        searched.append(len(texts))
        return contamination(rows, texts)

    monkeypatch.setattr("finetune_assets.data.contamination.contamination", counting)
    text = tmp_path / "general.txt"

    def found(content: str) -> tuple[object, object]:
        text.write_text(content, encoding="utf-8")
        check = evaluated(project, monkeypatch, rows, f"evaluation.general_text={text}", *KEEP)["contamination"]
        return check.passed, check.metadata["rows"].value

    assert found("Nothing of the rows.") == found("Nothing of the rows.") == (True, 0)
    assert len(searched) == 1
    assert found(copied) == found(copied) == (False, 1)
    assert len(searched) == 2
    assert found("Nothing of the rows.") == (True, 0)
    assert len(searched) == 2


def test_judgements_that_contradict_each_other_stop_a_training(
    project: TestProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And long preferred answers warn."""
    rows = [
        {"instruction": f"Where is {first}{second}?", "chosen": "Lowfen, by the river", "rejected": "Midvale"}
        for first in "abcdefghij"
        for second in "klmnop"
    ]
    rows += [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:4]]
    overrides = ("training.objective=dpo", "data.near_duplicate_threshold=null")
    checks = evaluated(project, monkeypatch, rows, *overrides, blocks=True)
    assert {"conflicting_judgements", "length_bias"} <= {name for name, check in checks.items() if not check.passed}
    conflicts = checks["conflicting_judgements"]
    assert conflicts.severity is dg.AssetCheckSeverity.ERROR
    assert conflicts.metadata["rows"].value == 8
    assert "row 0 and row 60" in str(conflicts.description)
    assert checks["length_bias"].severity is dg.AssetCheckSeverity.WARN
    assert checks["length_bias"].metadata["length_bias"].value > 0.5


def test_prompts_whose_tokens_change_warn_and_leave_the_dataset_as_it_is(
    project: TestProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packaged tokenizer has no token for a space and a `z`: for such answers alone, the space at the end of the
    demo's prompts is a token of its own. The threshold is no part of the dataset."""
    answers = ["z", "The Thames", "z too", "A boat"] * 25
    rows = [{"instruction": f"What is number {i}?", "response": answer} for i, answer in enumerate(answers)]
    warned = evaluated(project, monkeypatch, rows, *KEEP)["prompt_boundary"]
    assert not warned.passed
    assert warned.severity is dg.AssetCheckSeverity.WARN
    assert warned.metadata["fraction"].value == pytest.approx(0.5, abs=0.1)
    first = int(str(warned.metadata["first_rows"].value).split(",")[0])
    assert rows[first]["response"].startswith("z")
    for named in (f"dolly_raw: {first}", "max_changed_prompts_share = 0.01", "prompt_no_input", "[' ']"):
        assert named in str(warned.description), warned.description
    (dataset,) = project.published("tokenized")
    manifest = project.store.manifest("tokenized", dataset)
    threshold = "data.checks.max_changed_prompts_share=0.7"
    allowed = evaluated(project, monkeypatch, rows, *KEEP, threshold)["prompt_boundary"]
    assert allowed.passed
    assert allowed.metadata["rows"].value == warned.metadata["rows"].value, "found after a cache hit too"
    assert project.published("tokenized") == [dataset]
    assert project.store.manifest("tokenized", dataset) == manifest
    assert manifest is not None
    assert {file.path for file in manifest.files} == {
        *(f"{split}.arrow" for split in ("train", "val", "gate", "packs")),
        "statistics.json",
        "preview.md",
    }
