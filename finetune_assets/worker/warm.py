"""Start Python modules as processes: forked from a fork server with their imports done, or as fresh interpreters.

FINETUNE_FORKSERVER: `off` for fresh interpreters always; the socket of a fork server that is shared; by default a
    process that runs jobs has one of its own on Linux machines without a GPU, which starts with its first job and ends
    with it. A process that has used CUDA must not be forked.
"""

import atexit
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol

from finetune_assets.worker import forkserver, gpus
from finetune_assets.worker.process import FORKSERVER, OFF, die_with_parent, openmp_waiting

END_SECONDS = 1
logger = logging.getLogger(__name__)


class Process(Protocol):
    """What launchers use of `subprocess.Popen`."""

    returncode: Any
    stderr: IO[str] | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class ForkServer:
    """A fork server that ends with this process.

    Attributes:
        address: Path of its socket, in a folder that only this user may enter.
    """

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="finetune-forkserver-")
        self.address = f"{self.folder}/socket"
        self._owner = os.getpid()
        environment = {**openmp_waiting(), **os.environ, "HF_HUB_OFFLINE": "1"}
        with socket.socket(socket.AF_UNIX) as listener:  # listens here already: a client need not wait for the imports
            listener.bind(self.address)
            listener.listen()
            file = listener.fileno()
            command = [sys.executable, "-P", forkserver.__file__, str(file)]  # as a file: see what it does for torchrun
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, pass_fds=[file])
        atexit.register(self.close)

    def close(self) -> None:
        """End it and its children."""
        if os.getpid() != self._owner:
            return  # a fork of the owner
        if self._process.stdin:
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._process.kill()  # it notices only between its imports
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@cache
def _own_of(owner: int) -> ForkServer:
    return ForkServer()


_starting = threading.Lock()


def own() -> ForkServer:
    """The fork server of this process, started if it has none yet."""
    with _starting:
        return _own_of(os.getpid())


def is_safe() -> bool:
    """Whether workers of this machine may be forked: the platform is Linux, and no GPU is used."""
    return sys.platform == "linux" and not gpus.visible()


def prepare() -> None:
    """Have this process's fork server import, where it will have one, while something else is done."""
    if FORKSERVER not in os.environ and is_safe():
        own()


def _address() -> str:
    said = os.environ.get(FORKSERVER)
    if said:
        return said
    return own().address if is_safe() else OFF


def was_forked() -> bool:
    """Whether a fork server forked this process, and forks what it starts."""
    return os.environ.get(FORKSERVER, OFF) != OFF


def start(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    stderr: int | None = None,
    binds: bool = False,
) -> Process:
    """Start `python -m MODULE ARGUMENTS`.

    Args:
        module: The module.
        arguments: Its arguments.
        environment: The whole environment of the process. FINETUNE_FORKSERVER is set in it.
        stderr: `subprocess.PIPE`, or None for that of this process.
        binds: Have the kernel kill it when this process dies; for modules that do not see to it themselves.
    """
    try:
        if (address := _address()) != OFF:
            return ForkedProcess(address, module, arguments, {**environment, FORKSERVER: address}, stderr)
    except OSError as e:
        logger.debug("no worker can be forked: %s", e)
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**environment, FORKSERVER: OFF},
        stderr=stderr,
        text=True,
        errors="replace",
        preexec_fn=die_with_parent if binds else None,
    )


def _connected(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


class ForkedProcess:
    """A process that a fork server has forked for this one.

    Attributes:
        pid: Its number.
        returncode: How it ended, as `subprocess` says it; None while it runs.
        stderr: What it writes there, if that was asked for.

    Args:
        address: Socket of the server.
        module: What it runs.
        arguments: Its arguments.
        environment: Its whole environment.
        stderr: `subprocess.PIPE`, or None for that of this process.

    Raises:
        OSError: if the server does not run.
    """

    def __init__(
        self,
        address: str,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        stderr: int | None = None,
    ) -> None:
        self.returncode: int | None = None
        self.stderr: IO[str] | None = None
        self._connection = _connected(address)
        read, write = os.pipe() if stderr == subprocess.PIPE else (None, None)
        try:
            asked = {
                "module": module,
                "arguments": [*arguments],
                "environment": {**environment},
                "folder": str(Path.cwd()),
            }
            body = json.dumps(asked).encode()
            _flush()
            files = [0, 1, 2 if write is None else write]
            socket.send_fds(self._connection, [len(body).to_bytes(4, "big")], files)
            self._connection.sendall(body)
            self._told = b""
            self.pid = int(self._next()["pid"])
        except (OSError, EOFError) as e:
            self._connection.close()
            if read is not None:
                os.close(read)
            raise OSError(f"the fork server ended: {e}") from e
        finally:
            if write is not None:
                os.close(write)
        if read is not None:
            self.stderr = os.fdopen(read, encoding="utf-8", errors="replace")

    def _next(self) -> dict[str, int]:
        while b"\n" not in self._told:
            part = self._connection.recv(4096)
            if not part:
                raise EOFError
            self._told += part
        line, _, self._told = self._told.partition(b"\n")
        return dict(json.loads(line))

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Args:
            timeout: Seconds.

        Returns:
            Its exit code; a process that ended with its server was killed.

        Raises:
            subprocess.TimeoutExpired: if it still runs.
        """
        if self.returncode is not None:
            return self.returncode
        if not self._told and not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("forked process", timeout or 0)
        try:
            self.returncode = int(self._next()["code"])
        except (OSError, EOFError):
            self.returncode = -signal.SIGKILL
        self._connection.close()
        return self.returncode

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(OSError):
                self._connection.send(bytes([number]))


def _flush() -> None:
    """What was written before comes first."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
