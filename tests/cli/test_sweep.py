"""`finetune sweep` on an empty store; test_sweep of integration runs one."""

import pytest
from commands import run
from projects import TestProject

from finetune_assets.config.loading import load_sweep


def test_sweeps_are_listed_with_what_is_done(project: TestProject, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "sweep", "list")
    assert code == 0
    (row,) = [line.split() for line in printed.splitlines() if "demo-ranks" in line]
    assert row == ["demo-ranks", str(len(load_sweep(project.configs, "demo-ranks"))), "0"]


def test_an_invalid_sweep_is_listed_with_the_others(project: TestProject, capsys: pytest.CaptureFixture[str]) -> None:
    (project.configs / "sweeps" / "all.yaml").write_text("experiment: demo\ngrid: {lora.rank: [4]}\nsample: -1\n")
    code, printed, err = run(capsys, "sweep", "list")
    assert code == 1
    assert ["all", "invalid"] in [line.split() for line in printed.splitlines()]
    assert any(line.split()[::2] == ["demo-ranks", "0"] for line in printed.splitlines())
    assert "all.yaml: sample: -1" in err


def test_no_report_before_a_point_is_done(project: TestProject, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "sweep", "report", "demo-ranks")
    assert code == 1
    assert "finetune sweep run demo-ranks" in err
