"""Batches that other processes compute: the same results, errors and order as in one, and no process is left."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_functions import end, has_torch, process, refuse, refuse_some, report, slow_square
from paths import ROOT
from processes import running, runs
from waiting import wait_for

from finetune_assets.data import cores
from finetune_assets.data.cores import available_cores
from finetune_assets.data.errors import DataError
from finetune_assets.data.processes import MOST, LostProcess, Processes, in_own_process, process_count
from finetune_assets.progress import Progress
from finetune_assets.progress.relay import BarState

OWNER = """
import sys
sys.path.insert(0, {tests!r})
from batch_functions import sleep
from finetune_assets.data.processes import Processes
with Processes(2) as processes:
    list(processes.map(sleep, [{folder!r}] * 4))
"""


def left() -> list[int]:
    """Processes that this one has started to compute batches."""
    mine = (each for each in running().values() if "finetune_assets.data.processes" in each.command)
    return [each.pid for each in mine if each.parent == os.getpid()]


def test_results_are_in_the_order_of_the_items_in_processes_that_end() -> None:
    with Processes(3) as processes:
        assert left() == []  # none is started before it is used
        assert list(processes.map(slow_square, range(9))) == [number**2 for number in range(9)]
        seen = list(processes.map(process, range(40)))
        assert {pid for pid, *_ in seen} == {*left(), os.getpid()}
        assert len(left()) == 2
        assert {tuple(facts) for pid, *facts in seen if pid != os.getpid()} == {("false", False, False)}
    assert left() == []


def test_items_are_taken_as_results_are_used() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with Processes(2) as processes:
        results = processes.map(slow_square, items())
        for used in range(1, 30):
            next(results)
            assert len(taken) <= used + 3


@pytest.mark.parametrize("count", [1, 2])
def test_the_error_of_the_first_bad_item_is_raised_after_the_results_before_it(count: int) -> None:
    results: list[int] = []
    with pytest.raises(DataError) as error, Processes(count) as processes:
        results.extend(processes.map(refuse_some, range(9)))
    assert (results, type(error.value), str(error.value)) == ([0, 1, 2], DataError, "row 3 is bad")
    assert left() == []


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_the_items_is_raised_after_the_results_before_it(count: int) -> None:
    def items() -> Iterator[int]:
        yield from (0, 1, 2)
        raise DataError("line 4 cannot be read")

    results: list[int] = []
    with pytest.raises(DataError, match="line 4"), Processes(count) as processes:
        results.extend(processes.map(slow_square, items()))
    assert results == [0, 1, 4]


def test_an_error_that_cannot_be_pickled_is_named_and_the_processes_compute_on() -> None:
    """The first item goes to another process."""
    with Processes(2) as processes:
        with pytest.raises(RuntimeError) as error:
            list(processes.map(refuse, [7]))
        assert str(error.value) == "Unpicklable: number 7"
        assert "in refuse" in error.value.__notes__[0]
        assert list(processes.map(slow_square, [2])) == [4]


def test_a_killed_process_is_named_with_the_setting() -> None:
    with pytest.raises(LostProcess) as error, Processes(2, "data.processes") as processes:
        list(processes.map(end, [os.getpid()] * 4))
    for fact in ("SIGKILL", "data.processes", "memory"):
        assert fact in str(error.value)
    assert error.value.retriable
    assert left() == []


class Shown(list[BarState]):
    """A display that keeps what it shows."""

    def show(self, state: BarState) -> None:
        self.append(state)


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run, which has not imported transformers."""
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.usefixtures("without_transformers")
def test_a_function_in_its_own_process_logs_and_shows_progress_in_this_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown = Shown()
    monkeypatch.setattr(Progress, "display", shown)
    pid = in_own_process(report, 7)
    assert pid != os.getpid()
    assert not runs(pid)
    (record,) = (each for each in caplog.records if each.name == "finetune_assets.data")
    assert (record.levelname, record.getMessage(), record.process) == ("WARNING", "7 rows are bad", pid)
    assert {(state.what, state.total) for state in shown} == {("checking", 7)}
    assert shown[-1].ended


@pytest.mark.usefixtures("without_transformers")
def test_it_has_torch_only_if_it_needs_it() -> None:
    assert not in_own_process(has_torch)
    assert in_own_process(has_torch, torch=True)


@pytest.mark.usefixtures("without_transformers")
def test_its_errors_are_raised_here() -> None:
    with pytest.raises(DataError, match="row 3 is bad"):
        in_own_process(refuse_some, 3)
    with pytest.raises(LostProcess, match=r"SIGKILL.*data\.processes"):
        in_own_process(end, os.getpid())
    assert left() == []


def test_a_process_with_transformers_calls_it_itself() -> None:
    import transformers

    assert transformers
    assert in_own_process(report, 1) == os.getpid()


def test_processes_end_when_their_owner_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER.format(tests=str(ROOT / "tests"), folder=str(tmp_path))]
    with subprocess.Popen(command, cwd=ROOT) as owner:
        wait_for(lambda: len([*tmp_path.iterdir()]) >= 2, 60)
        pids = [int(path.name) for path in tmp_path.iterdir()]
        assert all(runs(pid) for pid in pids)
        owner.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(runs(pid) for pid in pids), 60)


def test_a_function_that_cannot_be_pickled_is_computed_here() -> None:
    with Processes(2) as processes:
        assert list(processes.map(lambda _: os.getpid(), range(2))) == [os.getpid()] * 2
        assert left() == []


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(64)}, raising=False)
    monkeypatch.setattr(cores, "_quotas", lambda _: iter(()))
    assert process_count("3", 0, 100) == 3
    assert [process_count("auto", size, 100) for size in (0, 199, 200, 550, 10**6)] == [1, 1, 2, 5, MOST]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert process_count("auto", 10**6, 100) == 1


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/a\n", {"a/cpu.max": "max 100000"}, 64),
        ("3:cpu,cpuacct:/job\n1:memory:/job\n", {"cpu/job/cpu.cfs_quota_us": "400000"}, 4),
        ("3:cpu:/elsewhere\n", {"cpu/cpu.cfs_quota_us": "-1"}, 64),
        ("", {}, 64),
    ],
)
def test_a_cgroup_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(64)}, raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.with_name("cpu.cfs_period_us").write_text("100000")
    assert available_cores(tmp_path) == expected
