"""A real Dagster daemon on a project of a test's own, and what happens under it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
from integration import cli
from paths import ROOT
from processes import AGENT, JOB, RANK, kill, of_project
from projects import TestProject

T = TypeVar("T")
SECONDS, PAUSE_SECONDS = 480, 0.5


@dataclass
class Daemon:
    """A running daemon.

    Attributes:
        process: Its first process, leader of a session.
        project: The project it serves.
        log: What it says.
        killed: Whether `kill` has ended it; what it has started may go on.
    """

    process: "subprocess.Popen[bytes]"
    project: TestProject
    log: Path
    killed: bool = False

    @property
    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.from_config(str(self.project.root / "dagster_home"))

    @cached_property
    def held(self) -> dg.DagsterInstance:
        """One that stays open as long as the daemon runs, for what is asked again and again."""
        return self.instance

    def runs(self) -> list[Any]:
        """Newest first."""
        return list(self.held.get_run_records(limit=100))

    def made(self, asset: str) -> list[Any]:
        """Materialization records of an asset, oldest first."""
        return list(self.held.fetch_materializations(dg.AssetKey(asset), limit=100, ascending=True).records)

    def failed_checks(self, run_id: str) -> list[Any]:
        """Evaluations of the checks that failed in a run."""
        logs = self.held.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        evaluations = [entry.get_dagster_event().asset_check_evaluation_data for entry in logs]
        return [evaluation for evaluation in evaluations if not evaluation.passed]

    def wait_for_ticks(self, sensor: str, count: int = 2) -> None:
        """Wait until a sensor has looked so many times more, each time from beginning to end."""
        now = time.time()
        self.wait_for(f"{count} ticks of {sensor}", lambda: len(self._ticks(sensor, now)) >= count)

    def _ticks(self, sensor: str, after: float) -> list[Any]:
        """Ticks that have begun since, and ended."""
        states = [state for state in self.held.all_instigator_state() if state.instigator_name == sensor]
        ticks = [
            tick
            for state in states
            for tick in self.held.get_ticks(state.instigator_origin_id, state.selector_id, after=after)
        ]
        return [tick for tick in ticks if tick.status.name != "STARTED"]

    def wait_for(self, what: str, condition: Callable[[], T], seconds: float = SECONDS, asks: bool = True) -> T:
        """What `condition` finds, as soon as it finds something; with `asks`, the runs are told where it does not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            assert self.killed or self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(PAUSE_SECONDS)
        runs = (
            [(record.dagster_run.status, record.dagster_run.asset_selection) for record in self.runs()] if asks else []
        )
        raise AssertionError(f"not within {seconds} s: {what}; runs {runs}; {self.log.read_text()[-5000:]}")

    def quiet(self) -> bool:
        """Whether no run is going on."""
        return all(record.dagster_run.is_finished for record in self.runs())

    def kill(self) -> None:
        """The daemon alone; what it has started is left."""
        self.killed = True
        self.process.kill()
        self.process.wait(60)


DAEMON = ["dagster-daemon", "run", "-m", "finetune_assets.definitions"]


@contextmanager
def running(
    project: TestProject,
    command: Sequence[str] = DAEMON,
    ready: str = "Instance is configured",
    own_servers: bool = False,
    folder: Path = ROOT,
) -> Iterator[Daemon]:
    """A daemon in an environment that points to the project, until the block is left.

    Args:
        project: The project.
        command: A program beside this Python, and its arguments.
        ready: What it says once it works.
        own_servers: Whether each run has a fork server of its own, as outside of tests, and not the tests' one; needed
            for `processes_of`, which cannot tell the project of the workers of the tests' server.
        folder: Where it is started; the definitions that lie there are loaded.
    """
    log = project.root / f"daemon-{time.time_ns()}.log"
    program = Path(sys.executable).with_name(command[0])
    environment = {**(os.environ if own_servers else cli.environment()), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [program, *command[1:]], env=environment, cwd=folder, stdout=out, stderr=out, start_new_session=True
        )
    daemon = Daemon(process, project, log)
    daemon.wait_for("the daemon", lambda: ready in log.read_text(), asks=False)
    try:
        yield daemon
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
        if "held" in vars(daemon):
            daemon.held.dispose()
        kill(_session(process.pid))
        process.wait()


def _session(leader: int) -> list[int]:
    """Processes that are left of a session."""
    listed = subprocess.run(["ps", "-o", "pid=", "-s", str(leader)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def first_steps(instance: dg.DagsterInstance, run_id: str, steps: int) -> list[int]:
    """The step that each attempt at a training of so many steps told first; not 1 where it was resumed.

    Args:
        instance: Has the run's log, in which the worker tells each step.
        run_id: Of the run that trains, once or, where its step was tried again, several times.
        steps: Of the training.
    """
    found: list[int] = []
    begins = False
    for entry in instance.all_logs(run_id):
        event = entry.dagster_event
        if event and event.event_type_value in ("STEP_START", "STEP_RESTARTED") and event.step_key == "lora_adapter":
            begins = True
        elif begins and (step := re.search(rf"\b(\d+)/{steps}\b", entry.user_message.replace(",", ""))):
            found.append(int(step[1]))
            begins = False
    return found


def process_of_run(instance: dg.DagsterInstance, run_id: str) -> int:
    """The process that executes a run, as its events tell."""
    return next(
        entry.dagster_event.pid
        for entry in reversed(instance.all_logs(run_id))
        if entry.dagster_event and entry.dagster_event.pid
    )


WORKERS = (JOB, AGENT, RANK)
"""Words in the command lines of what a job consists of."""


def ranks_of(project: TestProject) -> list[int]:
    """Processes that train."""
    return sorted({*processes_of(project, RANK)} - {*processes_of(project, JOB, AGENT)})


def processes_of(project: TestProject, *words: str) -> list[int]:
    """Processes of a project whose command line has one of `words`."""
    return [one.pid for one in of_project(project.root, *words) if one.pid != os.getpid()]
