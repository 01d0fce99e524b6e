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
from contextlib import suppress
from pathlib import Path

import click
import dagster as dg

from finetune_assets.cli.request_guard import parse_names
from finetune_assets.errors import UserError
from finetune_assets.resources import deployment

PAUSE_SECONDS = 2
GRACE_SECONDS = 15
"""Time in which the webserver and the daemon end what they have started."""
CHECKPOINT_SECONDS = 60
"""Time in which what is left ends by SIGTERM, and a training saves a checkpoint, before it is killed."""
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
    take_signals()
    names = [f"--allow-host={name}" for name in allowed]
    workspace = ["-w", str(workspace_file())]
    page = [*WEBSERVER, "--host", host, *names, *workspace, "-p", str(port)]
    daemon = ["dagster-daemon", "run", *workspace]
    os.environ.setdefault("DAGSTER_DAEMON_LOG_LEVEL", "warning")  # at `info`, it reports each tick
    deployment.use_dagster_home()
    if "DAGSTER_HOME" in os.environ:
        with dg.DagsterInstance.get():
            pass  # creates its database: two processes that do so at once may both fail
    sys.exit(serve(page, daemon))


def workspace_file() -> Path:
    """The file that names the definitions: of the current folder, or of the project.

    Raises:
        UserError: if there is none.
    """
    candidates = [folder / deployment.WORKSPACE for folder in (Path(), deployment.root())]
    if found := next((path for path in candidates if path.is_file()), None):
        return found
    raise UserError(f"{candidates[-1]} does not exist; `finetune init` creates the files of a project")


def serve(page: list[str], daemon: list[str]) -> int:
    """Run both until the webserver exits, and return its exit code; a daemon that dies is restarted."""
    running = {"page": _start(page), "daemon": _start(daemon)}
    started = [*running.values()]
    try:
        while True:
            time.sleep(0.5)
            if running["page"].poll() is not None:
                return running["page"].returncode
            if running["daemon"].poll() is not None:
                print(f"The daemon exited with {running['daemon'].returncode}; restarting it", file=sys.stderr)
                time.sleep(PAUSE_SECONDS)
                running["daemon"] = _start(daemon)
                started.append(running["daemon"])
    except KeyboardInterrupt:
        return 0
    finally:
        end(started)  # also what a daemon that died has left, such as a run


def take_signals() -> None:
    """Exit on SIGTERM and SIGHUP, and on SIGINT also where it is ignored, as a shell starts what is in its background.

    The processes that are started would ignore SIGINT too, and not end by it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # by nohup
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(0))


def end(processes: "list[subprocess.Popen[bytes]]") -> None:
    """End processes and all that they have started: code servers, and runs with their trainings.

    Each first has time to end what it has started, and then everything that is left in its process group is ended.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the second Ctrl-C, or that of the terminal after SIGTERM
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal_groups(processes, number)
        deadline = time.monotonic() + CHECKPOINT_SECONDS
        while _signal_groups(processes, 0) and time.monotonic() < deadline:
            time.sleep(0.2)


def _signal_groups(processes: "list[subprocess.Popen[bytes]]", number: int) -> bool:
    """Send a signal, or none (0), to the processes' groups, and return whether any process was left in them."""
    left = False
    for process in processes:
        process.poll()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            left = True
    return left


def _start(command: list[str]) -> "subprocess.Popen[bytes]":
    """Start a command in a process group of its own, which has the number of its process."""
    program, *arguments = command
    return subprocess.Popen([Path(sys.executable).with_name(program), *arguments], start_new_session=True)
