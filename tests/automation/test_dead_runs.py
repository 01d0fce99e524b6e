"""A run whose process is gone does not stay `started`."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dagster as dg
import pytest
from dagster import DagsterEvent, DagsterEventType
from dagster._core.remote_origin import (
    InProcessCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from integration.cli import materialize_command
from projects import TestProject

from finetune_assets.automation.dead_runs import dead_runs_sensor
from finetune_assets.resources import run_liveness
from finetune_assets.resources.project import Project

HOLDS = """
import sys, time
from finetune_assets.resources import run_liveness
lock = run_liveness.acquire_run_lock(sys.argv[1])
print("holds", flush=True)
time.sleep(600)
"""
SERVER = InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="finetune_assets.definitions"))
FROM_A_SERVER = RemoteJobOrigin(RemoteRepositoryOrigin(SERVER, "__repository__"), "job")
"""What a run has that the daemon or the UI started, and one of the command line has not."""


@dg.op
def work(project: Project) -> None:
    project.lineage("demo")


@dg.job(resource_defs={"project": Project()})
def job() -> None:
    work()


@pytest.fixture
def instance(project: TestProject) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.get() as instance:
        yield instance


def tick(instance: dg.DagsterInstance, cursor: str | None = None) -> str | None:
    """One look of the sensor, with the cursor of the look before; returns its own."""
    result = dead_runs_sensor(dg.build_sensor_context(instance, cursor=cursor))
    assert isinstance(result, dg.SensorResult)
    assert not result.run_requests
    return result.cursor


def status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run
    return run.status


def started(instance: dg.DagsterInstance, origin: RemoteJobOrigin | None) -> str:
    """The record of a run that goes on."""
    run = instance.create_run_for_job(job, remote_job_origin=origin)
    begun = DagsterEvent(event_type_value=DagsterEventType.RUN_START.value, job_name=run.job_name)
    instance.report_dagster_event(begun, run.run_id)
    return run.run_id


@contextmanager
def process_of(run_id: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that holds what a run's process holds."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, run_id], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        yield process
        process.kill()


def ends_as(instance: dg.DagsterInstance, run_id: str, kill: Callable[[], None], expected: dg.DagsterRunStatus) -> None:
    """A run is left alone while its process lives, and ended at the second look after."""
    cursor = tick(instance, tick(instance))
    assert status(instance, run_id) is dg.DagsterRunStatus.STARTED
    kill()
    assert run_liveness.dead_run_ids() == [run_id]
    cursor = tick(instance, cursor)
    assert status(instance, run_id) is dg.DagsterRunStatus.STARTED, "whoever else knows of it is given time to say so"
    tick(instance, cursor)
    assert status(instance, run_id) is expected
    assert run_liveness.dead_run_ids() == []


@pytest.mark.parametrize(
    ("origin", "expected"),
    [(FROM_A_SERVER, dg.DagsterRunStatus.FAILURE), (None, dg.DagsterRunStatus.CANCELED)],
    ids=["the daemon's", "of the command line"],
)
def test_run_whose_process_is_killed_is_ended(
    instance: dg.DagsterInstance, origin: RemoteJobOrigin | None, expected: dg.DagsterRunStatus
) -> None:
    """As failed, which the daemon starts again, or as canceled where nobody would."""
    run_id = started(instance, origin)
    with process_of(run_id) as process:
        ends_as(instance, run_id, lambda: (process.kill(), process.wait())[0], expected)


@pytest.mark.system
def test_killed_run_of_the_command_line_is_ended(instance: dg.DagsterInstance) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(materialize_command("*"), **quiet)  # type: ignore[call-overload]
    going_on = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])
    while not (records := instance.get_run_records(going_on)) or not any(run_liveness._folder().glob("*")):
        assert process.poll() is None
        time.sleep(0.1)
    run_id = records[0].dagster_run.run_id
    ends_as(instance, run_id, lambda: (process.kill(), process.wait())[0], dg.DagsterRunStatus.CANCELED)


def test_run_holds_its_lock_and_leaves_none(instance: dg.DagsterInstance) -> None:
    held: list[list[str]] = []

    @dg.op
    def look(project: Project) -> None:
        held.append([path.name for path in run_liveness._folder().glob("*")])
        assert run_liveness.dead_run_ids() == []

    @dg.job(resource_defs={"project": Project()})
    def looks() -> None:
        look()

    done = looks.execute_in_process(instance=instance)
    assert done.success
    assert held == [[done.run_id]]
    assert not list(run_liveness._folder().glob("*"))


def test_lock_of_a_run_that_is_not_known_is_taken_away(instance: dg.DagsterInstance) -> None:
    run_liveness.acquire_run_lock("gone").release()
    assert run_liveness.dead_run_ids() == ["gone"]
    tick(instance)
    assert run_liveness.dead_run_ids() == []
