"""A real Dagster daemon on a project of a test's own, and what happens under it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
from paths import ROOT
from projects import TestProject

T = TypeVar("T")
SECONDS = 240


@dataclass
class Daemon:
    """A running daemon.

    Attributes:
        process: Its first process, leader of a session.
        project: The project it serves.
        log: What it says.
    """

    process: "subprocess.Popen[bytes]"
    project: TestProject
    log: Path

    @property
    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.from_config(str(self.project.root / "dagster_home"))

    def runs(self) -> list[Any]:
        """Newest first."""
        with self.instance as instance:
            return list(instance.get_run_records(limit=100))

    def made(self, asset: str) -> list[Any]:
        """Materialization records of an asset, oldest first."""
        with self.instance as instance:
            return list(instance.fetch_materializations(dg.AssetKey(asset), limit=100, ascending=True).records)

    def wait_for(self, what: str, condition: Callable[[], T], seconds: float = SECONDS, asks: bool = True) -> T:
        """What `condition` finds, as soon as it finds something; with `asks`, the runs are told where it does not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(2)  # what is asked costs as much as what is waited for
        runs = (
            [(record.dagster_run.status, record.dagster_run.asset_selection) for record in self.runs()] if asks else []
        )
        raise AssertionError(f"not within {seconds} s: {what}; runs {runs}; {self.log.read_text()[-5000:]}")

    def quiet(self) -> bool:
        """Whether no run is going on."""
        return all(record.dagster_run.is_finished for record in self.runs())

    def kill(self) -> None:
        """The daemon alone; what it has started is left."""
        self.process.kill()
        self.process.wait(60)


DAEMON = ["dagster-daemon", "run", "-m", "finetune_assets.definitions"]


@contextmanager
def running(
    project: TestProject, command: Sequence[str] = DAEMON, ready: str = "Instance is configured"
) -> Iterator[Daemon]:
    """A daemon in an environment that points to the project, until the block is left.

    Args:
        project: The project.
        command: A program beside this Python, and its arguments.
        ready: What it says once it works.
    """
    log = project.root / f"daemon-{time.time_ns()}.log"
    program = Path(sys.executable).with_name(command[0])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [program, *command[1:]], env=environment, cwd=ROOT, stdout=out, stderr=out, start_new_session=True
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
        for pid in _session(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def _session(leader: int) -> list[int]:
    """Processes that are left of a session."""
    listed = subprocess.run(["ps", "-o", "pid=", "-s", str(leader)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def processes_of(project: TestProject, *words: str) -> list[int]:
    """Processes whose command line has one of `words`, and whose environment is the project's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (folder / "environ").read_bytes().decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        mine = f"DAGSTER_HOME={project.root}/" in environment
        if mine and state != "Z" and int(folder.name) != os.getpid() and any(word in command for word in words):
            found.append(int(folder.name))
    return found
