"""A run whose process is gone does not stay `started`."""

import subprocess
import time
from collections.abc import Iterator

import dagster as dg
import pytest
from integration.cli import materialize_command
from projects import TestProject

from finetune_assets.automation.dead_runs import dead_runs_sensor
from finetune_assets.resources import alive


@pytest.fixture
def instance(project: TestProject) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.get() as instance:
        yield instance


def tick(instance: dg.DagsterInstance, cursor: str | None = None) -> dg.SensorResult:
    result = dead_runs_sensor(dg.build_sensor_context(instance, cursor=cursor))
    assert isinstance(result, dg.SensorResult)
    return result


def test_killed_run_of_the_command_line_is_ended(instance: dg.DagsterInstance) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(materialize_command("*"), **quiet)  # type: ignore[call-overload]
    started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])
    while not (records := instance.get_run_records(started)) or not any(alive._folder().glob("*")):
        assert process.poll() is None
        time.sleep(0.1)
    run_id = records[0].dagster_run.run_id
    assert tick(instance, f'["{run_id}"]').skip_reason == dg.SkipReason("every run has its process")
    process.kill()
    process.wait()

    first = tick(instance)
    assert (run := instance.get_run_by_id(run_id))
    assert run.status is dg.DagsterRunStatus.STARTED, "whoever else knows of it is given time to say so"
    tick(instance, first.cursor)
    assert (run := instance.get_run_by_id(run_id))
    assert run.status is dg.DagsterRunStatus.CANCELED
    assert alive.died() == []


def test_run_that_ended_leaves_no_lock(instance: dg.DagsterInstance) -> None:
    assert subprocess.run(materialize_command("dolly_raw", None), capture_output=True).returncode == 0
    assert not list(alive._folder().glob("*"))


def test_lock_of_a_run_that_is_not_known_is_taken_away(instance: dg.DagsterInstance) -> None:
    alive.hold("gone").release()
    assert alive.died() == ["gone"]
    tick(instance)
    assert alive.died() == []
