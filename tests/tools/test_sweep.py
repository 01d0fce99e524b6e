"""`finetune-sweep` on an empty store; test_sweep of integration runs one."""

import pytest
from projects import TestProject

from finetune_assets.config.loading import load_sweep
from finetune_assets.tools import sweep


def test_sweeps_are_listed_with_what_is_done(project: TestProject, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sweep.main(["list"])
    assert not end.value.code
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if "demo-ranks" in line]
    assert row == ["demo-ranks", str(len(load_sweep(project.configs, "demo-ranks"))), "0"]


def test_no_report_before_a_point_is_done(project: TestProject) -> None:
    with pytest.raises(SystemExit, match="demo-ranks"):
        sweep.main(["report", "demo-ranks"])
