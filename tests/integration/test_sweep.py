"""Ranks on real rows, through the graph, to the report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from integration.cli import environment
from integration.test_real_data import EXPERIMENT
from projects import TestProject

SOAK = bool(os.environ.get("SOAK"))
RANKS = (1, 2, 4, 8, 16, 32) if SOAK else (1, 16)


def sweep(*arguments: str) -> str:
    command = [sys.executable, "-m", "finetune_assets.cli", "sweep", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**environment(), "COLUMNS": "200"})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.mark.minutes
@pytest.mark.real_data
@pytest.mark.soak
@pytest.mark.system
def test_a_sweep_finds_the_smallest_rank(
    project: TestProject, dolly: Path, stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, experiment = dolly, EXPERIMENT.format(model=stories260k)
    if not SOAK:
        rows, experiment = tmp_path / "rows.jsonl", experiment.replace("max_steps: 25", "max_steps: 8")
        rows.write_text("".join(dolly.read_text(encoding="utf-8").splitlines(keepends=True)[:800]), encoding="utf-8")
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(rows))
    project.write_experiment("real", experiment)
    (project.configs / "sweeps" / "ranks.yaml").write_text(
        f"experiment: real\ngrid: {{lora.rank: [{', '.join(map(str, RANKS))}]}}\n"
    )
    sweep("run", "ranks")
    plot = project.root / "ranks.svg"
    report = sweep("report", "ranks", "--plot", str(plot))
    table = [line for line in report.splitlines() if line.strip()[:1].isdecimal()]
    assert [int(line.split()[0]) for line in table] == [*RANKS], "a line for each rank, by size"
    assert "</svg>" in plot.read_text()
    trained = project.published("adapters")
    assert len(trained) == len(RANKS)
    sweep("run", "ranks")
    assert project.published("adapters") == trained
    assert not list(project.store_root.glob("tests/champions/*")), "no point is promoted"
