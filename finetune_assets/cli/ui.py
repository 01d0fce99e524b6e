"""`finetune ui`: Dagster's webserver, and its daemon, which runs the sensors, until Ctrl-C.

Each has a code server of its own, as in production. `dagster dev` shares one between both, which is reloaded only in
the UI: new files in `configs/experiments/` would not be trained automatically. The webserver refuses requests of other
sites' pages (`webserver.py`).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import dagster as dg

from finetune_assets.cli.request_guard import parse_names

PAUSE_SECONDS = 2
WORKSPACE = ("-w", "workspace.yaml")
WEBSERVER = (Path(sys.executable).name, "-m", "finetune_assets.cli.webserver")


def _valid_names(_context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    try:
        parse_names(texts)
    except ValueError as e:
        raise click.BadParameter(str(e)) from e
    return texts


allow_host = click.option(
    "--allow-host",
    "allowed",
    multiple=True,
    metavar="NAME",
    envvar="FINETUNE_UI_HOSTS",
    show_envvar=True,
    callback=_valid_names,
    help="Another name under which browsers reach the UI, such as that of a reverse proxy. Repeatable.",
)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=3000, show_default=True, help="Port of the webserver.")
@allow_host
def ui(host: str, port: int, allowed: tuple[str, ...]) -> None:
    """Start Dagster's webserver and daemon, until Ctrl-C.

    Dagster has no login: keep the default address, or put a reverse proxy that has one before it. Requests under
    other names than localhost, HOST and those of --allow-host are refused, and so are those of other sites' pages.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    names = [f"--allow-host={name}" for name in allowed]
    page = [*WEBSERVER, "--host", host, *names, *WORKSPACE, "-p", str(port)]
    daemon = ["dagster-daemon", "run", *WORKSPACE]
    if "DAGSTER_HOME" in os.environ:
        with dg.DagsterInstance.get():
            pass  # creates its database: two processes that do so at once may both fail
    sys.exit(serve(page, daemon))


def serve(page: list[str], daemon: list[str]) -> int:
    """Run both until the webserver exits, and return its exit code; a daemon that dies is restarted."""
    running = {"page": _start(page), "daemon": _start(daemon)}
    try:
        while True:
            time.sleep(0.5)
            if running["page"].poll() is not None:
                return running["page"].returncode
            if running["daemon"].poll() is not None:
                print(f"The daemon exited with {running['daemon'].returncode}; restarting it", file=sys.stderr)
                time.sleep(PAUSE_SECONDS)
                running["daemon"] = _start(daemon)
    except KeyboardInterrupt:
        return 0
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)  # as the terminal does
        for process in running.values():
            process.wait()


def _start(command: list[str]) -> "subprocess.Popen[bytes]":
    program, *arguments = command
    return subprocess.Popen([Path(sys.executable).with_name(program), *arguments])
