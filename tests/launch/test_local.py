"""The launcher with real processes: the artifact, the worker's own error, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from integration.cli import environment
from launch.conftest import LINGERS
from processes import runs
from tiers import tiered
from waiting import wait_for

from finetune_assets.launch.local import LocalEngine
from finetune_assets.store.artifacts import ArtifactRef, open_store
from finetune_assets.worker.job import JobFailed, JobSpec, from_json
from finetune_assets.worker.process import FORKSERVER, OFF


def adapters(tmp_path: Path) -> ArtifactRef | None:
    return open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache").find("adapters", "f1")


def nothing_left(tmp_path: Path) -> bool:
    return adapters(tmp_path) is None and not list((tmp_path / "cache" / "work").glob("*"))


@pytest.mark.parametrize("processes", tiered([None, "1", "auto"], {None, "1"}))
def test_job_ends_in_an_artifact(job: Callable[..., JobSpec], tmp_path: Path, processes: str | None) -> None:
    ref = LocalEngine().run(job("good", processes), {})
    assert ref == adapters(tmp_path)
    store = open_store(f"file://{tmp_path}/store", "me", tmp_path / "elsewhere")
    assert (store.fetch(ref) / "x.txt").read_text() == "HELLO"


OWN_WORDS = {
    "user_error": "rank: 0 is wrong",
    "crash": "the disk is on fire",
    "import_error": "no_such_module",
    "exit": "last words",
}
FOR_EVERY_CHANGE = {("user_error", "1"), ("import_error", None), ("exit", "1")}
"""Crashes are also in other tests here: `one_rank` with torchrun, and `lingering` without."""


@pytest.mark.parametrize(
    ("body", "processes"),
    [
        pytest.param(body, count, marks=[] if (body, count) in FOR_EVERY_CHANGE else pytest.mark.system)
        for body in OWN_WORDS
        for count in (None, "1")
    ],
)
def test_failure_is_told_in_the_workers_own_words(
    job: Callable[..., JobSpec], tmp_path: Path, body: str, processes: str | None
) -> None:
    with pytest.raises(JobFailed) as error:
        LocalEngine().run(job(body, processes), {})
    assert OWN_WORDS[body] in str(error.value)
    assert body != "user_error" or str(error.value) == OWN_WORDS[body], "and nothing else"
    assert nothing_left(tmp_path)


def test_a_dead_rank_brings_all_down_with_its_own_error(job: Callable[..., JobSpec], tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="rank one is ill"):
        LocalEngine().run(job("one_rank", "2"), {})
    assert nothing_left(tmp_path)


def test_what_a_dead_worker_left_behind_does_not_hold_up_the_news(job: Callable[..., JobSpec], tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(JobFailed, match="gone early"):
        LocalEngine().run(job("lingering", None), {})
    with suppress(ProcessLookupError):
        os.kill(int((tmp_path / "cache" / "lingers").read_text()), signal.SIGKILL)
    assert time.monotonic() - began < LINGERS


def test_worker_never_asks_the_hub(job: Callable[..., JobSpec]) -> None:
    ref = LocalEngine().run(job("hub", None), {"HF_HUB_OFFLINE": "0"})
    assert Path(ref.uri.removeprefix("file://"), "x.txt").read_text() == "1"


LAUNCH = """
import sys
from pathlib import Path
from finetune_assets.worker.job import from_json
from finetune_assets.launch.local import LocalEngine
LocalEngine().run(from_json(Path(sys.argv[1]).read_text()), {})
"""


@pytest.mark.parametrize(
    ("how", "fresh"),
    [(signal.SIGKILL, True), (signal.SIGINT, False), (signal.SIGINT, True)],
    ids=["kill -9", "interrupt", "interrupt of fresh interpreters"],
)
def test_no_process_outlives_the_launcher(
    job: Callable[..., JobSpec], tmp_path: Path, how: signal.Signals, fresh: bool
) -> None:
    """torchrun, which was terminated, prints nothing."""
    (tmp_path / "job.json").write_text(job("sleep").to_json())
    assert from_json((tmp_path / "job.json").read_text()) == job("sleep")
    printed = tmp_path / "printed"
    with printed.open("w") as file:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(tmp_path / "job.json")],
            # Fresh interpreters, as with a GPU, end with their parent; test_warm kills the owner of forked ones
            env={**os.environ, FORKSERVER: OFF} if fresh else environment(),
            stderr=file,
            # A shell starts background jobs with SIGINT ignored, and the tests may run in one
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    worker = wait_for(lambda: next(iter((tmp_path / "cache" / "work").glob("*/output/started")), None))
    assert worker
    pid = int(wait_for(worker.read_text))
    launcher.send_signal(how)
    launcher.wait(300)
    wait_for(lambda: not runs(pid))
    running = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split()
    alive = [p for p in running if int(p) != os.getpid() and Path(f"/proc/{p}").exists()]
    assert not alive
    assert adapters(tmp_path) is None
    assert "torch/distributed" not in printed.read_text()
