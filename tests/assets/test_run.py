"""What holds for the length of one run, and what one version of the raw data is compared with."""

from pathlib import Path

import dagster as dg
import pytest
from projects import TestProject

from finetune_assets.assets.dolly_raw import dolly_raw
from finetune_assets.resources.project import Project


def test_what_is_edited_meanwhile_is_for_the_next_run(project: TestProject) -> None:
    """An adapter that was trained with the settings of before is also evaluated with them."""
    demo = project.configs / "experiments" / "demo.yaml"
    seen: list[float] = []

    @dg.op
    def before(project: Project) -> None:
        seen.append(project.lineage("demo").experiment.config.training.learning_rate)
        demo.write_text(demo.read_text().replace("learning_rate: 1.0e-3", "learning_rate: 2.0e-3"))

    @dg.op(ins={"after": dg.In(dg.Nothing)})
    def after(project: Project) -> None:
        seen.append(project.lineage("demo").experiment.config.training.learning_rate)

    @dg.job(resource_defs={"project": Project()})
    def run() -> None:
        after(before())

    assert run.execute_in_process().success
    assert seen == [1e-3, 1e-3]
    seen.clear()
    assert run.execute_in_process().success
    assert seen == [2e-3, 2e-3]


def test_what_the_rows_are_called_is_read_once_a_run_too(project: TestProject) -> None:
    raw, seen = project.configs / "raw_data.yaml", []

    @dg.op
    def before(project: Project) -> None:
        seen.append(project.raw().config.columns.instruction)
        raw.write_text("source: ./rows.csv\ncolumns: {instruction: asked}\n")

    @dg.op(ins={"after": dg.In(dg.Nothing)})
    def after(project: Project) -> None:
        seen.append(project.raw().config.columns.instruction)

    @dg.job(resource_defs={"project": Project()})
    def run() -> None:
        after(before())

    assert run.execute_in_process().success
    assert run.execute_in_process().success
    assert seen == [None, None, "asked", "asked"]


def checked(instance: dg.DagsterInstance, source: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the check `row_count` passed for so many rows in a source."""
    rows = (f'{{"instruction": "{source.name} {i}?", "response": "Answer {i}."}}\n' for i in range(count))
    source.write_text("".join(rows))
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(source))
    done = dg.materialize([dolly_raw], instance=instance, resources={"project": Project()}, raise_on_error=False)
    (found,) = (check for check in done.get_asset_check_evaluations() if check.check_name == "row_count")
    return bool(found.passed)


def test_rows_are_missed_in_their_own_source_alone(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = dg.DagsterInstance.ephemeral()
    mine, others = project.root / "mine.jsonl", project.root / "others.jsonl"
    assert checked(instance, others, 100, monkeypatch)
    assert checked(instance, mine, 20, monkeypatch), "a first version of its own, however few"
    assert not checked(instance, mine, 5, monkeypatch)
    assert checked(instance, mine, 15, monkeypatch), "the bad version is not what the next one is compared with"
    assert not checked(instance, others, 40, monkeypatch)
