"""Workers forked from a server that has their imports: a process like any other, and never left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import runs
from tiers import tiered
from waiting import wait_for

from finetune_assets.worker import gpus, warm
from finetune_assets.worker.process import FORKSERVER, OFF

PROGRAM = """
import json, os, sys, time

def facts():
    import torch
    return {
        "argv": sys.argv[1:], "folder": os.getcwd(),
        "variables": {n: os.environ[n] for n in os.environ if n[:3] == "MY_"},
        "forked": "transformers" in sys.modules, "threads": torch.get_num_threads(), "path": sys.path[:2],
        "cuda": torch.cuda.is_initialized(),
    }

def main():
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "facts": print(json.dumps(facts()))
    print("to stderr", file=sys.stderr)
    if what == "text": sys.exit("the end")
    if what == "raise": raise RuntimeError("broken")
    if what == "_exit": os._exit(7)
    if what == "sleep": time.sleep(600)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., warm.Process]]:
    """Starts PROGRAM from this process's own server, with stdout in the file `out`."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "the_program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    started: list[warm.Process] = []

    def start(*arguments: str, stderr: int | None = subprocess.PIPE, **variables: str) -> warm.Process:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "modules"), **variables}
        with open(tmp_path / "out", "wb") as out:
            kept = os.dup(1)
            os.dup2(out.fileno(), 1)
            try:
                started.append(warm.start("the_program", arguments, environment, stderr, binds=True))
            finally:
                os.dup2(kept, 1)
                os.close(kept)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def said(tmp_path: Path) -> dict[str, object]:
    wait_for(lambda: (tmp_path / "out").read_text().endswith("\n"), 60)
    return json.loads((tmp_path / "out").read_text())


def test_it_has_its_own_arguments_folder_environment_and_threads(
    program: Callable[..., warm.Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_OLD", "1")
    process = program("facts", "b c", MY_NEW="2", OMP_NUM_THREADS="3")
    assert process.stderr
    assert process.stderr.read() == "to stderr\n"
    assert process.wait() == 0
    assert said(tmp_path) == {
        "argv": ["facts", "b c"],
        "folder": str(tmp_path),
        "variables": {"MY_OLD": "1", "MY_NEW": "2"},
        "forked": True,
        "threads": 3,
        "path": [str(tmp_path), str(tmp_path / "modules")],
        "cuda": False,
    }
    monkeypatch.delenv("MY_OLD")
    program("facts").wait()
    assert said(tmp_path)["variables"] == {}, "nothing of an earlier child is left"


@pytest.mark.parametrize("server", ["own", OFF])
def test_it_ends_as_a_fresh_interpreter_would(
    program: Callable[..., warm.Process], monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    if server == OFF:
        monkeypatch.setenv(FORKSERVER, OFF)
    ended = {}
    for how in ("", "text", "raise", "_exit"):
        process = program(how)
        assert process.stderr
        ended[how] = (process.stderr.read().splitlines()[-1], process.wait())
    assert ended == {
        "": ("to stderr", 0),
        "text": ("the end", 1),
        "raise": ("RuntimeError: broken", 1),
        "_exit": ("to stderr", 7),
    }
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = program("sleep")
        assert process.stderr
        process.stderr.readline()
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        (process.terminate if number == signal.SIGTERM else process.kill)()
        assert process.wait() == process.poll() == -number


def test_ps_shows_it_by_its_own_name(program: Callable[..., warm.Process]) -> None:
    process = program("sleep")
    assert isinstance(process, warm.ForkedProcess)
    assert process.stderr
    process.stderr.readline()
    command = Path(f"/proc/{process.pid}/cmdline").read_text().rstrip("\0")
    assert command == f"{sys.executable} -m the_program sleep"


OWNER = """
import os, time
from finetune_assets.worker import warm
child = warm.start("the_program", ["sleep"], {**os.environ}, stderr=-1)
child.stderr.readline()
print(child.pid, warm.own()._process.pid, file=open("numbers", "w"), flush=True)
"""


@pytest.fixture
def owner(program: Callable[..., warm.Process], tmp_path: Path) -> Iterator[Callable[[str], tuple[int, int, int]]]:
    """Starts a process that has a server of its own and a child, and then goes on: the numbers of all three."""
    running = []
    environment = {name: value for name, value in os.environ.items() if name != FORKSERVER}
    environment["PYTHONPATH"] = str(tmp_path / "modules")

    def make(then: str) -> tuple[int, int, int]:
        (tmp_path / "numbers").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", OWNER + then], env=environment, stdout=subprocess.DEVNULL)
        running.append(process)
        wait_for(lambda: (tmp_path / "numbers").exists() and (tmp_path / "numbers").read_text().endswith("\n"), 60)
        child, server = map(int, (tmp_path / "numbers").read_text().split())
        return process.pid, server, child

    yield make
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.system
@pytest.mark.parametrize("victim", tiered(["owner", "server", "child"], system={"owner"}))
def test_a_kill_leaves_no_process(owner: Callable[[str], tuple[int, int, int]], victim: str) -> None:
    numbers = dict(zip(("owner", "server", "child"), owner("child.wait()"), strict=True))
    os.kill(numbers[victim], signal.SIGKILL)
    wait_for(lambda: not any(map(runs, numbers.values())), 5)


@pytest.mark.system
def test_a_server_that_is_asked_to_end_waits_for_its_children(owner: Callable[[str], tuple[int, int, int]]) -> None:
    me, server, child = owner("child.wait()")
    os.kill(server, signal.SIGTERM)
    time.sleep(0.5)  # nothing can be waited for where nothing is to happen
    assert runs(child)
    os.kill(child, signal.SIGTERM)
    wait_for(lambda: not any(map(runs, (me, server, child))), 5)


@pytest.mark.system
def test_without_its_server_a_worker_is_a_fresh_interpreter(
    owner: Callable[[str], tuple[int, int, int]], tmp_path: Path
) -> None:
    then = """
again = warm.start("the_program", ["x"], {**os.environ})
print(type(again).__name__, again.wait(), file=open("again", "w"), flush=True)
"""
    _, server, _ = owner("child.wait()" + then)
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: (tmp_path / "again").exists() and (tmp_path / "again").read_text().endswith("\n"), 60)
    assert (tmp_path / "again").read_text().split() == ["Popen", "0"]


def test_no_fork_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORKSERVER, raising=False)
    monkeypatch.setattr(gpus, "visible", lambda: ["0"])
    assert not warm.is_safe()
