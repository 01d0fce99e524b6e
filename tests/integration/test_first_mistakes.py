"""What a newcomer gets wrong first: one clear error, exit code 1, and nothing half-written after."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from integration.cli import materialize
from projects import TestProject

from finetune_assets.data.sources import SAMPLE
from finetune_assets.store.base_models import PACKAGED

Mistake = Callable[[TestProject, pytest.MonkeyPatch], None]


def rows(text: str | bytes) -> Mistake:
    def make(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
        body = text.encode() if isinstance(text, str) else text
        (project.root / "rows.jsonl").write_bytes(body)
        monkeypatch.setenv("FINETUNE_RAW_DATA", "./rows.jsonl")

    return make


def missing_file(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_RAW_DATA", "./gone.jsonl")


def edited(old: str, new: str) -> Mistake:
    def make(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
        demo = project.configs / "experiments" / "demo.yaml"
        text = demo.read_text()
        assert old in text
        demo.write_text(text.replace(old, new))

    return make


def damaged_model(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(PACKAGED["demo-base"], project.root / "model"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    edited("base_model: demo-base", "base_model: ./model")(project, monkeypatch)


GOOD = SAMPLE.read_text(encoding="utf-8")
FEW = "".join(GOOD.splitlines(keepends=True)[:50])
SECOND = json.dumps({"instruction": "Who?", "response": ["x"]})
MISTAKES: dict[str, tuple[Mistake, list[str]]] = {
    "unknown key": (edited("learning_rate:", "learnin_rate:"), ["demo.yaml", "training.learnin_rate", "learning_rate"]),
    "wrong type": (edited("epochs: 15", "epochs: many"), ["demo.yaml", "training.epochs", "many"]),
    "impossible": (edited("micro_batch_size: 8", "micro_batch_size: 80"), ["demo.yaml", "micro_batch_size", "80"]),
    "bad enum": (edited("precision: fp32", "precision: fp23"), ["demo.yaml", "training.precision", "fp32"]),
    "broken yaml": (edited("model:\n", "model\n"), ["demo.yaml", "line"]),
    "no such model": (edited("base_model: demo-base", "base_model: demo_base"), ["demo_base", "demo-base"]),
    "template": (
        edited("{instruction}\\n### Response: ", "{instructions}\\n### Response: "),
        ["demo.yaml", "prompt_no_input", "{instructions}"],
    ),
    "missing file": (missing_file, ["gone.jsonl", "does not exist"]),
    "empty file": (rows(""), ["rows.jsonl", "empty"]),
    "broken line": (rows(FEW + '{"instruction": "Wh'), ["1 of 51 rows", "rows.jsonl:51", "not JSON"]),
    "wrong value": (rows(FEW + SECOND), ["1 of 51 rows", "rows.jsonl:51", "'response' must be text", '["x"]']),
    "other columns": (rows('{"instruction": "a", "answer": "b"}'), ["rows.jsonl:1", "'response' is missing", "answer"]),
    "too long": (edited("cutoff_len: 192", "cutoff_len: 1000"), ["data.tokenization.cutoff_len", "1000", "512"]),
    "damaged model": (damaged_model, ["local/model", "model.safetensors", "damaged"]),
    "unknown target": (edited("rank: 32", "rank: 32\n  target_modules: [w]"), ["lora.target_modules", "w"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_first_mistake(project: TestProject, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mistake, words = MISTAKES[name]
    mistake(project, monkeypatch)
    run = materialize()
    assert run.returncode == 1
    told = [line for line in run.stdout.splitlines() if "events.Failure:" in line or "check quarantine failed:" in line]
    assert told, run.stdout[-3000:]
    for word in words:
        assert word in told[0]
    assert not project.published("tokenized" if "check quarantine" in told[0] else "adapters")
    assert not project.leftovers()


def test_few_bad_rows_are_set_aside_and_told(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 801 is below the default share: the rest is used, and the row is in the artifact with its line."""
    rows(GOOD + SECOND)(project, monkeypatch)
    assert materialize("dolly_raw", partition=None).returncode == 0
    (name,) = project.published("raw")
    folder = project.store.fetch(project.store.resolve("raw", name, "dolly_raw"))
    (bad,) = map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
    assert (bad["file"], bad["line"], json.loads(bad["text"])) == ("rows.jsonl", 801, json.loads(SECOND))


def test_unknown_experiment(project: TestProject) -> None:
    run = materialize(partition="dmeo")
    assert run.returncode != 0
    assert "dmeo" in run.stdout
    assert not project.store_root.exists()
