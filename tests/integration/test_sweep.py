"""A sweep through the graph to its report: of two points, and on real rows in `make soak`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from integration.cli import environment
from integration.test_real_data import EXPERIMENT
from omegaconf import OmegaConf
from projects import SHORT, TestProject

from finetune_assets.config.loading import load_sweep

SOAK = bool(os.environ.get("SOAK"))
RANKS = (1, 2, 4, 8, 16, 32) if SOAK else (1, 16)


def sweep(*arguments: str) -> str:
    command = [sys.executable, "-m", "finetune_assets.cli", "sweep", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**environment(), "COLUMNS": "200"})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def ranks(report: str) -> list[int]:
    """Of the points in the table of a report, in its order."""
    return [int(line.split()[0]) for line in report.splitlines() if line.strip()[:1].isdecimal()]


@pytest.mark.system
def test_points_are_run_once_and_compared(project: TestProject, capsys: pytest.CaptureFixture[str]) -> None:
    def report(*arguments: str) -> str:
        code, printed, _ = run(capsys, "sweep", "report", "own", *arguments)
        assert code == 0
        return printed

    def wanted(*ranks: int, more: str = "") -> None:
        grid = f"{{lora.rank: {[*ranks]}{more}}}"
        (project.configs / "sweeps" / "own.yaml").write_text(f"experiment: own\ngrid: {grid}\n")

    demo = OmegaConf.load(project.configs / "experiments" / "demo.yaml")
    project.write_experiment("own", OmegaConf.to_yaml(OmegaConf.merge(demo, OmegaConf.from_dotlist([*SHORT]))))
    wanted(4)
    sweep("run", "own")
    (first,) = project.published("adapters")
    wanted(8, 4)
    before, (waiting, _) = report(), load_sweep(project.configs, "own")
    assert (ranks(before), waiting.name in before) == ([4], True), "one point is compared, the other is not done"
    done = sweep("run", "own")
    assert ["already done" in line for line in done.splitlines() if line[:2] in {"1/", "2/"}] == [False, True]
    assert first in project.published("adapters")
    plot = project.root / "plot.svg"
    assert ranks(report("--plot", str(plot))) == [4, 8], "a line for each rank, by size"
    assert "</svg>" in plot.read_text()
    wanted(8, 4, more=", training.seed: [42]")
    by_seeds = report()
    assert ranks(by_seeds) == [4, 8], "the same adapters"
    assert by_seeds.split()[:2] == ["lora.rank", "seeds"], "not a line for each seed"
    assert not list(project.store_root.glob("tests/champions/*")), "no point is promoted"


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
    assert ranks(report) == [*RANKS], "a line for each rank, by size"
    assert "</svg>" in plot.read_text()
    trained = project.published("adapters")
    assert len(trained) == len(RANKS)
    sweep("run", "ranks")
    assert project.published("adapters") == trained
    assert not list(project.store_root.glob("tests/champions/*")), "no point is promoted"
