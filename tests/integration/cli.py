"""`dagster asset materialize`, as CI runs it."""

import json
import subprocess
import sys


def materialize(
    select: str = "*", partition: str | None = "demo", overrides: list[str] | None = None, force: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run it and return exit code and output (stdout and stderr together, in `stdout`)."""
    command = materialize_command(select, partition, overrides, force)
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


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


def reused(run: subprocess.CompletedProcess[str]) -> set[str]:
    """Assets that said there was nothing to do."""
    lines = (line for line in run.stdout.splitlines() if "nothing to do" in line)
    return {line.split(" - ")[-2] for line in lines}
