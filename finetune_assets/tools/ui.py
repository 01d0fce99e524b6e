"""`make ui`: Dagster's page and its daemon, in which the sensors run, until Ctrl-C.

Each has a code server of its own, as in production. `dagster dev` shares one between both, and then nobody but a person
reloads it: new files in `configs/experiments/` would not train by themselves.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

PAUSE_SECONDS = 2
WORKSPACE = ("-w", "workspace.yaml")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="finetune_assets.tools.ui", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="who may connect (%(default)s: this machine)")
    parser.add_argument("--port", type=int, default=3000, help="of the page (%(default)s)")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    page = ["dagster-webserver", *WORKSPACE, "-h", args.host, "-p", str(args.port)]
    daemon = ["dagster-daemon", "run", *WORKSPACE]
    if "DAGSTER_HOME" in os.environ:
        with dg.DagsterInstance.get():
            pass  # makes its database where there is none: of two that do so at once, both may fail
    sys.exit(serve(page, daemon))


def serve(page: list[str], daemon: list[str]) -> int:
    """Run both until the page ends, with its exit code; a daemon that dies is started again."""
    running = {"page": _start(page), "daemon": _start(daemon)}
    try:
        while True:
            time.sleep(0.5)
            if running["page"].poll() is not None:
                return running["page"].returncode
            if running["daemon"].poll() is not None:
                print(f"the daemon has ended ({running['daemon'].returncode}) and is started again", file=sys.stderr)
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


if __name__ == "__main__":
    main()
