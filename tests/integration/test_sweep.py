"""Ranks on real rows, through the graph, to the report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from integration.test_real_data import EXPERIMENT
from projects import TestProject

SOAK = bool(os.environ.get("SOAK"))
RANKS = (1, 2, 4, 8, 16, 32) if SOAK else (1, 16)


def sweep(*arguments: str) -> str:
    command = [sys.executable, "-m", "finetune_assets.tools.sweep", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.mark.real_data
def test_a_sweep_finds_the_smallest_rank(
    project: TestProject, dolly: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(dolly))
    experiment = EXPERIMENT.format(model=stories260k)
    project.write_experiment(
        "real", experiment if SOAK else experiment.replace("data:\n", "data:\n  num_samples: 1500\n")
    )
    (project.configs / "sweeps" / "ranks.yaml").write_text(
        f"experiment: real\ngrid: {{lora.rank: [{', '.join(map(str, RANKS))}]}}\n"
    )
    sweep("run", "ranks")
    plot = project.root / "ranks.svg"
    said = sweep("report", "ranks", "--plot", str(plot))
    assert f"The best of {len(RANKS)} is ranks.rank-" in said
    assert "smallest within noise" in said
    assert "frontier" in said
    assert "</svg>" in plot.read_text()
    assert sweep("run", "ranks").count("done already") == len(RANKS)
    assert not list(project.store_root.glob("tests/champions/*")), "no point is promoted"
