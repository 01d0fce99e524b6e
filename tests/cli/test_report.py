"""`finetune report` as a person types it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run
from projects import TestProject

from finetune_assets.artifacts.champions import Champions
from finetune_assets.store.artifacts import ArtifactRef


def test_two_runs_side_by_side(
    project: TestProject, publish: Callable[..., ArtifactRef], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = publish("a")
    second = publish("b", "lora.rank=7", "training.learning_rate=0.01", experiment="other")
    states = [json.loads((project.store.fetch(ref) / "trainer_state.json").read_text()) for ref in (first, second)]

    code, said, _ = run(capsys, "compare", "demo", second.fingerprint[:6], "--json")
    assert code == 0
    told = json.loads(said)
    assert told["settings"] == {"training.learning_rate": ["0.001", "0.01"], "lora.rank": ["32", "7"]}
    assert told["inputs"] == told["versions"] == {}
    assert [one["fingerprint"] for one in told["runs"]] == [first.fingerprint, second.fingerprint]
    loss = told["numbers"]["held_out_loss_after"]
    assert [loss["first"], loss["second"]] == [round(state["held_out_loss"]["after"], 4) for state in states]
    assert loss["difference"] == pytest.approx(loss["second"] - loss["first"])

    code, said, _ = run(capsys, "compare", "demo", "other")
    assert code == 0
    assert any(line.split() == ["lora.rank", "32", "7"] for line in said.splitlines())

    Champions(project.store, "other").promote_by_hand(first, "so", "tests")
    told = json.loads(run(capsys, "compare", "other", second.fingerprint, "--json")[1])
    assert [one["fingerprint"] for one in told["runs"]] == [first.fingerprint, second.fingerprint], "the champion"

    code, said, _ = run(capsys, "report", str(tmp_path / "pages" / "all.html"))
    assert code == 0
    page = (tmp_path / "pages" / "all.html").read_text(encoding="utf-8")
    assert first.fingerprint[:12] in page
    assert second.fingerprint[:12] in page
    for name, ref in (("demo", first), ("other", second)):
        assert f'href="all-experiments/{name}.html"' in page
        of_experiment = (tmp_path / "pages" / "all-experiments" / f"{name}.html").read_text(encoding="utf-8")
        assert ref.fingerprint in of_experiment
        assert 'href="../all.html"' in of_experiment


def test_a_run_that_is_not_there_is_refused(project: TestProject, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "compare", "demo", "ffff")
    assert code == 1
    assert "'demo'" in err
