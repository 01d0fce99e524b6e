"""What a newcomer gets wrong first, on the command line: exit code 1, one line that names it, and nothing half-written.

All other bad inputs are tested without a command line in test_bad_inputs.
"""

import subprocess
import sys
from collections.abc import Sequence

import pytest
from integration.cli import environment, materialize
from projects import TestProject

from finetune_assets.sources.local import SAMPLE

TRACEBACK = "Traceback (most recent call last)"


def fails_and_names(facts: Sequence[str], partition: str = "demo") -> None:
    """Run everything for an experiment; one line of what is printed holds all the facts."""
    run = materialize(partition=partition)
    assert run.returncode == 1
    lines = run.stdout.splitlines()
    assert any(all(fact in line for fact in facts) for line in lines), run.stdout[-3000:]
    assert not any(TRACEBACK in line for line in lines)


def test_unknown_setting(project: TestProject) -> None:
    demo = project.configs / "experiments" / "demo.yaml"
    demo.write_text(demo.read_text().replace("learning_rate:", "learnin_rate:"))
    fails_and_names(["demo.yaml", "training.learnin_rate", "'learning_rate'"])
    assert not project.published("tokenized")
    assert not project.leftovers()


@pytest.mark.system
def test_broken_line(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    good = b"".join(SAMPLE.read_bytes().splitlines(keepends=True)[:50])
    (project.root / "rows.jsonl").write_bytes(good + b'{"instruction": "Wh')
    monkeypatch.setenv("FINETUNE_RAW_DATA", "./rows.jsonl")
    fails_and_names(["quarantine", "1 of 51", "rows.jsonl:51"])
    assert not project.published("tokenized")
    assert not project.leftovers()


@pytest.mark.system
def test_a_run_prints_no_warnings_of_other_packages(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONWARNINGS")
    command = [sys.executable, "-m", "finetune_assets.cli", "run", "demo", "--select", "dolly_raw,cached_base_model"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert "Warning" not in run.stdout + run.stderr


@pytest.mark.system
def test_unknown_experiment(project: TestProject) -> None:
    run = materialize(partition="dmeo")
    assert run.returncode != 0
    assert "dmeo" in run.stdout
    assert not project.store_root.exists()
