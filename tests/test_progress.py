"""How far a transfer is, told in the terminal and in the Dagster run."""

import logging
import os
import time
from pathlib import Path

import dagster as dg
import pytest
from servers import proxy as proxy_server
from servers.hub import Hub
from servers.proxy import Fault

from finetune_assets import progress as progress_module
from finetune_assets.assets.making import in_run
from finetune_assets.launch.job import JobSpec
from finetune_assets.launch.local import LocalLauncher
from finetune_assets.launch.pipes import run_in_pipes
from finetune_assets.progress import Progress, gigabytes, in_parallel
from finetune_assets.store.artifacts import open_store
from finetune_assets.store.base_models import PACKAGED, collect, locate

BIG = 20_000_000


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress_module, "EVERY_SECONDS", 0.05)
    caplog.set_level(logging.INFO, "finetune_assets")


def test_bytes_speed_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    with Progress("fetching x", 3_000_000_000) as progress:
        progress.began -= 10
        progress.told -= 10
        progress.add(1_000_000_000)
        progress.add(2_000_000_000)
    first, last = (record.getMessage() for record in caplog.records)
    assert first == "fetching x: 1.0 GB of 3.0 GB · 100 MB/s · ETA 0:00:20"
    assert last == "fetching x: 3.0 GB in 10.0 s · 300 MB/s"
    told = [gigabytes(count) for count in (0, 999, 1500, 2_500_000, 16.06e9)]
    assert told == ["0 bytes", "999 bytes", "1.5 kB", "2.5 MB", "16.1 GB"]


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
    told = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("downloading owner/model from the Hub: ") and "ETA" in line for line in told)
    assert any("MB in" in line for line in told)


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
    monkeypatch.setenv("PYTHONPATH", str(modules))
    store = open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")

    @dg.asset
    def publishes_and_fetches(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with in_run(context):
            ref = store.publish(made, "raw", "f", "f", {})
            spec = JobSpec(
                module="job_main",
                config="",
                inputs={"data": ref},
                kind="adapters",
                fingerprint="g",
                made_from={},
                store=store.url,
                namespace="me",
                cache=str(store.cache.root),
            )
            run_in_pipes(context, LocalLauncher(), spec)
        return dg.MaterializeResult()

    with dg.DagsterInstance.get() as instance:
        run = dg.materialize([publishes_and_fetches], instance=instance)
        told = [entry.user_message for entry in instance.all_logs(run.run_id)]
    assert any(line.startswith("publishing raw/f: 20.0 MB in") for line in told)
    assert any(line.startswith("fetching me/raw/f: 20.0 MB in") for line in told), "by the job's own process"
    assert not any("unexpected message" in line for line in told)
    assert "\nfetching me/raw/f: 20.0 MB in" in capfd.readouterr().err
