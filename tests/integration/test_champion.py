"""The gate on real trainings of the demo: what is better is promoted, what is not is refused with its number."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from integration.cli import materialize
from projects import TestProject

from finetune_assets.config.loading import load_experiment, load_raw_data_config
from finetune_assets.data.rows import Split, draw, side_of
from finetune_assets.data.sources import SAMPLE
from finetune_assets.store.champions import Champions, Record

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

    def __init__(self, project: TestProject, raw: Path) -> None:
        self.project, self.raw = project, raw
        self.settings = (project.configs / "experiments" / "demo.yaml").read_text()

    @property
    def history(self) -> list[Record]:
        return Champions(self.project.store, "demo").history()

    def train(self, overrides: list[str] | None = None, **training: float) -> str:
        """What champion_adapter said."""
        experiment = yaml.safe_load(self.settings)
        experiment["training"].update(training)
        experiment["evaluation"] |= {"generated_rows": 4, "max_new_tokens": 8}
        (self.project.configs / "experiments" / "demo.yaml").write_text(yaml.safe_dump(experiment))
        run = materialize("*", overrides=overrides)
        assert run.returncode == 0, run.stdout[-3000:]
        said = [line for line in run.stdout.splitlines() if " INFO " in line and " champion_adapter - " in line]
        return next(line for line in said if " is " in line).partition("champion_adapter - ")[2]


def command(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "finetune_assets.tools.adapter", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_what_is_better_is_promoted_and_what_is_not_is_refused(project: TestProject, raw: Path, rows: Rows) -> None:
    gate = Gate(project, raw)
    said = gate.train(max_steps=20)
    assert re.search(r"is promoted \(record 1\): it gains on the base \+\d+\.\d+ nats a token over 51 rows", said)

    said = gate.train(max_steps=60)
    assert re.search(r"is promoted \(record 2\): it gains on the champion \+\d+\.\d+", said), said
    first, second = gate.history
    assert (first.against, second.against) == (None, first.adapter)
    evaluation = project.store.resolve("evaluations", second.evaluation or "", "adapter_evaluation")
    found = json.loads((project.store.fetch(evaluation) / "evaluation.json").read_text())
    assert found["contenders"].keys() == {"base", "challenger", "champion"}
    assert all({"base", "challenger", "champion", "expected"} <= sample.keys() for sample in found["samples"])
    served = {path.name: path.read_bytes() for path in project.store.fetch(_champion(project)).iterdir()}

    if SOAK:
        said = gate.train(max_steps=60)
        assert "is the champion already (record 2): a gain of 0" in said

    said = gate.train(["training.seed=3"], max_steps=60)
    assert "is not promoted by itself: it was made with settings of one run alone (training.seed=3)" in said

    shuffled = [row["response"] for row in rows[Split.TRAIN]]
    random.Random(0).shuffle(shuffled)
    wrong = [{**row, "response": answer} for row, answer in zip(rows[Split.TRAIN], shuffled, strict=True)]
    write(raw, {**rows, Split.TRAIN: wrong})
    said = gate.train(max_steps=60)
    assert re.search(r"is refused: .*it gains on the champion -\d+\.\d+ nats a token", said), said

    if SOAK:
        write(raw, {**rows, Split.TRAIN: rows[Split.TRAIN][:10]})
        said = gate.train(max_steps=60, learning_rate=5.0e-3)
        assert re.search(
            r"is refused: it has forgotten \d+\.\d+ nats a token of the general text, and at most 2 may be", said
        )
    assert gate.history == [first, second], "what is refused leaves no record"

    command("rollback", "demo", "--reason", "a test")
    before = {path.name: path.read_bytes() for path in project.store.fetch(_champion(project)).iterdir()}
    assert before != served
    raw.write_bytes(SAMPLE.read_bytes())
    said = gate.train(max_steps=60)
    assert "is not promoted by itself: it was rolled back" in said
    command("promote", "demo", second.adapter[:16], "--reason", "it was right")
    again = {path.name: path.read_bytes() for path in project.store.fetch(_champion(project)).iterdir()}
    assert again == served, "to the byte"
    assert [record.action for record in gate.history] == ["promoted", "promoted", "rolled back", "promoted by hand"]


def _champion(project: TestProject):  # type: ignore[no-untyped-def]
    return Champions(project.store, "demo").champion()
