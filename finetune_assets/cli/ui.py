"""`finetune ui`: Dagster's webserver, and its daemon, which runs the sensors, until Ctrl-C.

Each has a code server of its own, as in production. `dagster dev` shares one between both, which is reloaded only in
the UI: new files in `configs/experiments/` would not be trained automatically.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import dagster as dg

PAUSE_SECONDS = 2
WORKSPACE = ("-w", "workspace.yaml")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=3000, show_default=True, help="Port of the webserver.")
def ui(host: str, port: int) -> None:
    """Start Dagster's webserver and daemon, until Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    page = ["dagster-webserver", *WORKSPACE, "-h", host, "-p", str(port)]
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
