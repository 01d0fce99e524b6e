"""`dagster asset materialize`, as CI runs it, with its workers forked from the fork server of the tests."""

import json
import os
import subprocess
import sys

from finetune_assets.worker import warm
from finetune_assets.worker.process import FORKSERVER


def environment() -> dict[str, str]:
    """This process's environment, and where a run that is started with it forks its workers."""
    return {**os.environ, **({FORKSERVER: warm.own().address} if FORKSERVER not in os.environ else {})}


def materialize(
    select: str = "*",
    partition: str | None = "demo",
    overrides: list[str] | None = None,
    force: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run it and return exit code and output (stdout and stderr together, in `stdout`)."""
    command = materialize_command(select, partition, overrides, force)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, env=environment(), check=False, **pipes)  # type: ignore[call-overload]


def materialize_command(
    select: str, partition: str | None = "demo", overrides: list[str] | None = None, force: bool = False
) -> list[str]:
    config = {"resources": {"project": {"config": {"overrides": overrides or [], "force": force}}}}
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "finetune_assets.definitions"]
    command += ["--select", select, "--config-json", json.dumps(config)]
    return command + (["--partition", partition] if partition else [])


def run_at_once(command: list[str], environments: list[dict[str, str]]) -> list[str]:
    """Run a command in each of the environments at the same time; all must succeed. What each said."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, env=one, **pipes) for one in environments]  # type: ignore[call-overload]
    ended = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(ended)
    return ended
