"""How far a long thing is, told in lines: in the terminal and in the Dagster run."""

import logging
import os
import time
from pathlib import Path

import dagster as dg
import pytest
from raw import ingest
from servers import proxy as proxy_server
from servers.hub import Hub
from servers.proxy import Fault

from finetune_assets import progress as progress_module
from finetune_assets.assets.materialization import asset_step
from finetune_assets.config.schema import Data, PromptTemplate
from finetune_assets.data import ingest as ingest_module
from finetune_assets.data import selection as selection_module
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.launch.engines import Launcher
from finetune_assets.launch.pipes import run_in_pipes
from finetune_assets.progress import ROWS, STEPS, Progress, gigabytes, in_parallel
from finetune_assets.sources.base_models import PACKAGED, collect, locate
from finetune_assets.sources.local import SAMPLE
from finetune_assets.store.artifacts import open_store
from finetune_assets.worker.job import JobSpec

BIG = 20_000_000
PLAIN = PromptTemplate(
    prompt_input="{context} {instruction} R:", prompt_no_input="{instruction} R:", response_split="R:"
)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress_module, "EVERY_SECONDS", 0.05)
    caplog.set_level(logging.INFO, "finetune_assets")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress_module, "clock", lambda: self.now)
        monkeypatch.setattr(progress_module, "EVERY_SECONDS", 5.0)

    def count(self, progress: Progress, *counts: int, each: float) -> None:
        for count in counts:
            self.now += each
            progress.add(count)


def assert_says(line: str, *facts: str) -> None:
    assert all(fact in line for fact in facts), line


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_bytes_speed_and_time_left(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with Progress("fetching x", 3_000_000_000) as progress:
        clock.count(progress, 1_000_000_000, 2_000_000_000, each=10)
    under_way, done = told(caplog)
    assert_says(under_way, "fetching x", "1.0 GB", "3.0 GB", "100 MB/s", "0:00:20")
    assert_says(done, "fetching x", "3.0 GB", "20.0 s", "150 MB/s")
    sizes = [gigabytes(count) for count in (0, 999, 1500, 2_500_000, 16.06e9)]
    assert sizes == ["0 bytes", "999 bytes", "1.5 kB", "2.5 MB", "16.1 GB"]


def test_time_left_is_by_the_speed_of_late(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    progress = Progress("tokenizing", 20_000, ROWS)
    clock.count(progress, *[10] * 100, each=1)
    clock.count(progress, *[100] * 30, each=1)
    assert_says(told(caplog)[-1], "tokenizing", "4,000 of 20,000 rows", "100 rows/s", "0:02:40")
    slow = Progress("training", 100, STEPS, done=50)
    clock.count(slow, 1, 1, each=60)
    assert_says(told(caplog)[-1], "training", "52 of 100 steps", "1.0 steps/min", "0:48:00")  # not of another run
    endless = Progress("reading", None, ROWS)
    clock.count(endless, 12_000, each=6)
    assert_says(told(caplog)[-1], "reading", "12,000 rows", "2,000 rows/s")
    assert "ETA" not in told(caplog)[-1]
    assert len(told(caplog)) == 26 + 2 + 1, "a line each 5 s, but not more than there is news"


def test_short_work_is_not_told_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with Progress("tokenizing", 3_000, ROWS) as progress:
        clock.count(progress, 1_000, 1_000, 1_000, each=1)
    assert told(caplog) == []
    with Progress("tokenizing", 3_000, ROWS) as progress:
        clock.count(progress, 3_000, each=6)
    (line,) = told(caplog)
    assert_says(line, "tokenizing", "3,000 rows", "6.0 s", "500 rows/s")


def test_reading_and_tokenizing_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ingest_module, selection_module):
        monkeypatch.setattr(module, "ROWS_PER_BATCH", 300)
    monkeypatch.setattr(progress_module, "EVERY_SECONDS", 0.0)
    rows = ingest(tmp_path, SAMPLE)
    prepare_dataset(rows, load_tokenizer(str(PACKAGED["demo-base"])), Data(prompt_template=PLAIN), "salt", tmp_path)
    reading, tokenizing = ([line for line in told(caplog) if what in line] for what in ("reading", "tokenizing"))
    for index, rows_so_far in enumerate((300, 600)):
        assert_says(reading[index], f" {rows_so_far} rows")
        assert_says(tokenizing[index], f" {rows_so_far} of 800 rows")


def test_what_failed_ends_the_other_parts(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    def endless(progress: Progress) -> None:
        try:
            while True:
                progress.add(1)
                time.sleep(0.001)
        finally:
            ended.append("stopped")

    def broken() -> None:
        time.sleep(0.05)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), Progress("x", 10) as progress:
        in_parallel([lambda: endless(progress), broken, lambda: endless(progress)], progress)
    assert ended == ["stopped"] * 2


def test_download_from_the_hub_is_told(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in PACKAGED["demo-base"].iterdir()}
    hub.add("owner/model", {**files, "tokenizer.model": os.urandom(BIG)})
    with proxy_server.running(hub.url) as slow:
        monkeypatch.setenv("HF_ENDPOINT", slow.url)
        slow.faults.append(Fault(r"GET .*tokenizer\.model", "throttle", None, rate=40_000_000))
        collect(locate("owner/model", "main", tmp_path))
    lines = told(caplog)
    assert all("owner/model" in line for line in lines)
    assert len([line for line in lines if "ETA" in line]) == len(lines) - 1 > 0, "and one at the end"


def test_run_and_terminal_tell_of_what_is_published_and_fetched(
    project: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made, modules = tmp_path / "made", tmp_path / "modules"
    for folder in (made, modules):
        folder.mkdir()
    (made / "big.bin").write_bytes(os.urandom(BIG))
    (modules / "job_main.py").write_text(
        "import sys, pathlib\nout = sys.argv[sys.argv.index('--output') + 1]\npathlib.Path(out, 'x').write_text('x')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
    monkeypatch.setenv("FINETUNE_WORKER_MODULES", "job_main")
    store = open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")

    @dg.asset
    def publishes_and_fetches(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with asset_step(context):
            ref = store.publish(made, "raw", "f", "f", {})
            spec = JobSpec(
                module="job_main",
                config="",
                inputs={"dataset": ref},
                kind="adapters",
                fingerprint="g",
                made_from={},
                store=store.url,
                namespace="me",
                cache=str(store.cache.root),
            )
            run_in_pipes(context, Launcher(), spec)
        return dg.MaterializeResult()

    with dg.DagsterInstance.get() as instance:
        run = dg.materialize([publishes_and_fetches], instance=instance)
        lines = [entry.user_message for entry in instance.all_logs(run.run_id)]
    (fetched,) = [line for line in lines if "me/raw/f" in line and "20.0 MB" in line and "ETA" not in line]
    assert [line for line in lines if "raw/f" in line and "20.0 MB" in line and "ETA" not in line] != [fetched]
    assert not any("unexpected message" in line for line in lines), "Dagster's words for one that it does not know"
    assert f"\n{fetched}" in capfd.readouterr().err, "by the job's own process"
