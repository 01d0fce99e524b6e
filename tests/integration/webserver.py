"""Dagster's real webserver, as `finetune ui` starts it, on a small graph of a test's own."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from paths import ROOT

GUARDED = ("-m", "finetune_assets.cli.webserver")
UNGUARDED = ("-m", "dagster_webserver")
"""As before the guard: what the attacks of the tests are seen to work on."""
DEFINITIONS = """
import dagster as dg

@dg.asset
def victim() -> None: ...

defs = dg.Definitions(assets=[victim])
"""
LAUNCH = (
    'mutation { launchRun(executionParams: {selector: {repositoryLocationName: "definitions.py", repositoryName: '
    '"__repository__", pipelineName: "__ASSET_JOB"}, runConfigData: {}}) { __typename } }'
)
"""The GraphQL request that starts a run."""
SECONDS = 120


@dataclass(frozen=True)
class Webserver:
    """A running webserver.

    Attributes:
        port: It listens on 127.0.0.1.
        home: Dagster home.
        log: What it prints.
    """

    port: int
    home: Path
    log: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def runs(self) -> int:
        """Number of runs that were started."""
        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            return instance.get_runs_count()

    def reported(self) -> int:
        """Number of materializations of `victim` that were reported."""
        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            return len(instance.fetch_materializations(dg.AssetKey("victim"), limit=10).records)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(folder: Path, *options: str, module: Sequence[str] = GUARDED) -> Iterator[Webserver]:
    """The webserver until the block is left.

    Args:
        folder: A folder of the test's own.
        options: More options of the webserver.
        module: What is started.
    """
    (folder / "definitions.py").write_text(DEFINITIONS)
    home, log = folder / "webserver_home", folder / "webserver.log"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
    server = Webserver(free_port(), home, log)
    command = [sys.executable, *module, *options, "-f", "definitions.py", "-p", str(server.port)]
    environment = {**os.environ, "DAGSTER_HOME": str(home), "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
    try:
        _wait(process, server)
        yield server
    finally:
        process.terminate()
        process.wait(SECONDS)


def _wait(process: "subprocess.Popen[bytes]", server: Webserver) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{server.address}/server_info", timeout=5):
                return
        except OSError:
            assert process.poll() is None, server.log.read_text()
            time.sleep(0.2)
    raise AssertionError(f"no answer within {SECONDS} s: {server.log.read_text()}")
