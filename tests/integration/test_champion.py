"""The gate on real trainings of the demo: what is better is promoted, what is not is refused with its number."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from integration.graph import UP_TO_CHAMPION, Graph
from projects import TestProject

from finetune_assets.artifacts.champions import BY_HAND, PROMOTED, ROLLED_BACK, Champions, Record
from finetune_assets.cli.main import finetune
from finetune_assets.config.loading import load_experiment, load_raw_data_config
from finetune_assets.data.rows import Split, draw, side_of
from finetune_assets.sources.local import SAMPLE

SOAK = bool(os.environ.get("SOAK"))
Rows = dict[Split, list[dict[str, str]]]


@pytest.fixture
def rows(project: TestProject) -> Rows:
    """The packaged rows by side of the split."""
    data = load_experiment(project.configs, "demo").config.data
    salt = load_raw_data_config(project.configs).split_salt
    found: Rows = {side: [] for side in Split}
    for line in SAMPLE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[side_of(draw(row["instruction"], row.get("context", ""), salt), data)].append(row)
    return found


@pytest.fixture
def raw(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = project.root / "rows.jsonl"
    path.write_bytes(SAMPLE.read_bytes())
    with open(project.configs / "raw_data.yaml", "a") as settings:
        settings.write("\nchecks: {max_row_fall: 1.0}\n")  # which would stop a training on ten rows before it begins
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(path))
    return path


def write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for side in rows.values() for row in side), encoding="utf-8")


class Gate:
    """Edits the experiment and the rows, and lets the whole graph run."""

    def __init__(self, project: TestProject, graph: Graph, raw: Path) -> None:
        self.project, self.graph, self.raw = project, graph, raw
        self.settings = (project.configs / "experiments" / "demo.yaml").read_text()

    @property
    def history(self) -> list[Record]:
        return Champions(self.project.store, "demo").history()

    def train(self, overrides: Sequence[str] = (), **training: float) -> dict[str, Any]:
        """What the gate measured, and whether the new adapter serves (`passed`)."""
        experiment = yaml.safe_load(self.settings)
        experiment["training"] |= {"macro_batch_size": 2, "micro_batch_size": 2, **training}
        experiment["evaluation"] |= {"generated_rows": 4, "general_tokens": 2_000 if SOAK else 300}
        (self.project.configs / "experiments" / "demo.yaml").write_text(yaml.safe_dump(experiment))
        run = self.graph.run(UP_TO_CHAMPION, overrides=overrides)
        assert run.success, run.log
        checks = run.result.get_asset_check_evaluations()
        (gate,) = (check for check in checks if check.asset_key.to_user_string() == "champion_adapter")
        numbers = {name: entry.value for name, entry in gate.metadata.items()}
        return {**numbers, "passed": gate.passed, "reason": gate.description or ""}

    def served(self) -> dict[str, bytes]:
        """The files of the champion."""
        champion = Champions(self.project.store, "demo").champion()
        assert champion
        return {path.name: path.read_bytes() for path in self.project.store.fetch(champion).iterdir()}


def command(*arguments: str) -> None:
    """`finetune adapter`, which succeeds."""
    with pytest.raises(SystemExit) as end:
        finetune.main(["adapter", *arguments])
    assert not end.value.code


def test_what_is_better_is_promoted_and_what_is_not_is_refused(
    project: TestProject, graph: Graph, raw: Path, rows: Rows
) -> None:
    gate = Gate(project, graph, raw)
    assert gate.train(max_steps=10)["passed"]
    assert gate.train(max_steps=30)["passed"]
    first, second = gate.history
    assert [record.action for record in gate.history] == [PROMOTED, PROMOTED]
    assert (first.against, second.against) == (None, first.adapter)
    for record in gate.history:
        assert record.numbers["rows"] == 51
        assert record.numbers["mean"] > record.numbers["lower"] > 0
    evaluation = project.store.resolve("evaluations", second.evaluation or "", "adapter_evaluation")
    found = json.loads((project.store.fetch(evaluation) / "evaluation.json").read_text())
    assert found["contenders"].keys() == {"base", "challenger", "champion"}
    assert all({"base", "challenger", "champion", "expected"} <= sample.keys() for sample in found["samples"])
    served = gate.served()

    if SOAK:
        assert gate.train(max_steps=30)["passed"], "it serves already"
        assert gate.history == [first, second]

    shuffled = [row["response"] for row in rows[Split.TRAIN]]
    random.Random(0).shuffle(shuffled)
    wrong = [{**row, "response": answer} for row, answer in zip(rows[Split.TRAIN], shuffled, strict=True)]
    write(raw, {**rows, Split.TRAIN: wrong})
    worse = gate.train(max_steps=30)
    assert not worse["passed"]
    assert worse["mean"] < 0

    if SOAK:
        write(raw, {**rows, Split.TRAIN: rows[Split.TRAIN][:10]})
        forgetful = gate.train(max_steps=30, learning_rate=5.0e-3)
        assert not forgetful["passed"]
        assert forgetful["forgetting"] > 2
    assert gate.history == [first, second], "what is refused leaves no record"

    command("rollback", "demo", "--reason", "a test")
    assert gate.served() != served
    raw.write_bytes(SAMPLE.read_bytes())
    assert not gate.train(max_steps=30)["passed"], "it was rolled back, and comes back by hand alone"
    assert gate.history[-1].action == ROLLED_BACK
    command("promote", "demo", second.adapter[:16], "--reason", "it was right")
    assert gate.served() == served, "to the byte"
    assert [record.action for record in gate.history] == [PROMOTED, PROMOTED, ROLLED_BACK, BY_HAND]


@pytest.mark.system
def test_what_was_trained_with_overrides_is_not_promoted(project: TestProject, graph: Graph, raw: Path) -> None:
    gate = Gate(project, graph, raw)
    overridden = gate.train(["training.seed=3"], max_steps=30)
    assert not overridden["passed"]
    assert "training.seed=3" in overridden["reason"]
    assert gate.history == []
